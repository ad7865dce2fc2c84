"What `data check` finds of planted faults, and what it costs: `python -m bench.data FOLDER…`, folders of class folders."

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.planted import found, plant
from celestial_ml.core.params import Check, Data
from celestial_ml.data.catalog import make_catalog, with_split
from celestial_ml.data.checks import Finding
from celestial_ml.data.examine import examine


def findings_of(folder: Path) -> list[Finding]:
    "All findings, against no reference."
    return examine(with_split(make_catalog(folder, folder), Data(), 7), folder, Check()).findings


def wrong_labels(folder: Path, share: float = 0.05) -> tuple[int, int, int]:  # planted, found, suspected
    "Move a share of the pictures into another class, and look which are suspected."
    rng, paths = np.random.default_rng(0), sorted(p for p in folder.glob("*/*") if p.is_file())
    classes = sorted({path.parent for path in paths})
    moved = set()
    for path in rng.permutation(np.array(paths, object))[: round(share * len(paths))]:
        other = [one for one in classes if one != path.parent][rng.integers(len(classes) - 1)]
        moved.add(shutil.move(path, other / f"moved_{path.parent.name}_{path.name}"))
    suspects = next(set(f.images) for f in findings_of(folder) if f.check == "labels_fit")
    names = {Path(path).relative_to(folder).as_posix() for path in moved}
    return len(moved), sum(any(one.endswith(name) for name in names) for one in suspects), len(suspects)


def main() -> None:
    for source in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as home:
            folder = shutil.copytree(source, Path(home) / "set")
            began = time.process_time()
            clean = findings_of(folder)
            cost = time.process_time() - began
            print(
                f"{source.name}: {cost:.1f} s of CPU; clean: { {f.check: f.total for f in clean if f.status != 'pass'} }"
            )
            counts = found(planted := plant(folder), findings_of(folder))
            missed = {kind: f"{n} of {len(planted[kind])}" for kind, n in counts.items() if n < len(planted[kind])}
            print(
                f"  planted: {sum(counts.values())} of {sum(map(len, planted.values()))} found; missed in {missed or 'none'}"
            )
            folder = shutil.copytree(source, Path(home) / "labels")
            labels = wrong_labels(folder)
            print(f"  wrong labels: {labels[0]} planted, {labels[1]} found, {labels[2]} suspected", flush=True)


if __name__ == "__main__":
    main()
