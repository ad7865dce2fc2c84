"""What `data check` finds of planted faults, and what it costs.

python -m bench.data FOLDER…                   planted faults and wrong labels, in copies of folders of class folders
python -m bench.data FOLDER… --peer dataeval --python ENV/bin/python   and what another tool finds in the same copies
python -m bench.data FOLDER --wall             seconds of the command, with an empty feature store and with a full one
python -m bench.data --scale 10000 30000       seconds and memory for so many renders of 64 pixels
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench import CELESTIAL
from bench import wall as timed
from bench.planted import FILES, found, plant
from celestial_ml.core.params import Check, Data
from celestial_ml.data.catalog import make_catalog, with_split
from celestial_ml.data.checks import Finding
from celestial_ml.flow.reference import check_batch


def findings_of(folder: Path) -> list[Finding]:
    "All findings, against no reference."
    return check_batch(
        with_split(make_catalog(folder, folder), Data(), 7), folder, Check(reference="none"), "auto"
    ).findings


def wrong_labels(folder: Path, seed: int, share: float = 0.05) -> tuple[int, int, int]:  # planted, found, suspected
    "Move a share of the pictures into another class, and look which are suspected."
    rng, paths = np.random.default_rng(seed), sorted(p for p in folder.glob("*/*") if p.is_file())
    classes = sorted({path.parent for path in paths})
    moved = set()
    for path in rng.permutation(np.array(paths, object))[: round(share * len(paths))]:
        other = [one for one in classes if one != path.parent][rng.integers(len(classes) - 1)]
        moved.add(shutil.move(path, other / f"moved_{path.parent.name}_{path.name}"))
    suspects = next(set(f.images) for f in findings_of(folder) if f.check == "labels_fit")
    names = {Path(path).relative_to(folder).as_posix() for path in moved}
    return len(moved), sum(any(one.endswith(name) for name in names) for one in suspects), len(suspects)


def missed(counts: dict[str, int], planted: dict[str, list[str]]) -> str:
    kinds = [kind for kind in planted if counts[kind] < len(planted[kind])]
    return ", ".join(f"{kind} {counts[kind]} of {len(planted[kind])}" for kind in kinds) or "none"


def compare(peer: str, python: str, folder: Path, planted: dict[str, list[str]]) -> None:
    "What another tool finds in the same folder: a planted picture counts where any of its issues names it."
    script = Path(__file__).parent / "peer/checks.py"
    run = subprocess.run([python, script, peer, folder], capture_output=True, text=True, check=False)
    if run.returncode:
        print(f"  {peer} stops: {run.stderr.strip().splitlines()[-1]}")
        return
    answer = json.loads(run.stdout.splitlines()[-1])
    named = {path for paths in answer["issues"].values() for path in paths}
    kinds = {kind: paths for kind, paths in planted.items() if kind not in FILES}
    counts = {kind: sum(str(folder / one) in named for one in paths) for kind, paths in kinds.items()}
    clean = sum("planted_" not in path for path in named)
    print(
        f"  {peer}: {answer['seconds']:.1f} s; {sum(counts.values())} of {sum(map(len, kinds.values()))}; {clean} others named; missed {missed(counts, kinds)}"
    )


def planted_faults(source: Path, seeds: int, peer: str | None, python: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        began, cpu = time.perf_counter(), time.process_time()
        clean = findings_of(shutil.copytree(source, Path(home) / "set"))
        cost = f"{time.perf_counter() - began:.1f} s, {time.process_time() - cpu:.1f} s of CPU"
        print(f"{source.name}: {cost}; clean: { {f.check: f.total for f in clean if f.status != 'pass'} }", flush=True)
        for seed in range(seeds):
            folder = shutil.copytree(source, Path(home) / f"planted{seed}")
            counts = found(planted := plant(folder, seed=seed), findings := findings_of(folder))
            others = {i for f in findings if f.status != "pass" for i in f.images if "planted_" not in i}
            print(
                f"  seed {seed}: {sum(counts.values())} of {sum(map(len, planted.values()))} found; {len(others)} others named; missed {missed(counts, planted)}",
                flush=True,
            )
            if peer:
                compare(peer, python, folder, planted)
            labels = wrong_labels(shutil.copytree(source, Path(home) / f"labels{seed}"), seed)
            print(f"  wrong labels: {labels[0]} planted, {labels[1]} found, {labels[2]} suspected", flush=True)


def wall(folder: Path) -> None:
    "Seconds of the command, three times with an empty feature store, three times with a full one."
    command = [CELESTIAL, "data", "check", str(folder.resolve()), "--reference", "none", "--output"]
    with tempfile.TemporaryDirectory() as home:
        command.append(home)
        for kind in ("empty", "full"):
            seconds = []
            for i in range(3):
                state = f"{home}/{i if kind == 'empty' else 0}"
                seconds.append(round(timed(command, CELESTIAL_HOME=state), 2))
            print(f"{folder.name}, {kind} feature store: {seconds} s", flush=True)


_MEASURED = """
import resource, sys, time
from pathlib import Path
from bench.data import findings_of
began = time.perf_counter(), time.process_time()
findings_of(Path(sys.argv[1]))
print(f"{time.perf_counter() - began[0]:.0f} s, {time.process_time() - began[1]:.0f} s of CPU, "
      f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
"""


def scale(count: int) -> None:
    "Seconds and memory for renders of 64 pixels; each of 500 views is stored many times, with its own noise."
    from PIL import Image

    from celestial_ml.planets.renderer import View, render

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as home:
        for body in ("Earth", "Mars", "Jupiter", "Moon", "Pluto"):
            (Path(home) / body).mkdir()
            for view in range(100):
                turned = View(longitude_deg=float(rng.uniform(0, 360)), latitude_deg=float(rng.uniform(-45, 45)))
                picture = render(body, turned, size=64).astype(np.int16)
                for i in range(count // 500):
                    noisy = np.roll(picture, rng.integers(-9, 10, 2), (0, 1)) * rng.uniform(0.5, 1.1)
                    noisy = (noisy + rng.integers(-12, 13, picture.shape)).clip(0, 255).astype(np.uint8)
                    Image.fromarray(noisy).save(Path(home) / body / f"{view}-{i}.jpg", quality=85)
        run = [sys.executable, "-c", _MEASURED, home]
        state = os.environ | {"CELESTIAL_HOME": f"{home}/.state"}
        print(f"{count:,} renders: {subprocess.run(run, env=state, capture_output=True, text=True, check=True).stdout}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--peer", choices=["cleanvision", "dataeval"])
    parser.add_argument("--python", default=sys.executable, help="the peer's interpreter")
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--scale", nargs="+", type=int, default=[])
    options = parser.parse_args()
    for folder in options.folders:
        if options.wall:
            wall(folder)
        else:
            planted_faults(folder, options.seeds, options.peer, options.python)
    for count in options.scale:
        scale(count)


if __name__ == "__main__":
    main()
