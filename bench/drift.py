"""The promise of the drift detector, tried: false alarms where nothing changes, and images until a change is noticed.

`python -m bench.drift [--run output/guide] [--streams 200] [--evidently PYTHON]`, from the project's folder, on
the images that the run held out, with the figures that a server logs. Pictures are drawn with replacement, so that reference and
stream come from one distribution. Peers see the same streams, in their own interpreters: `bench/peer/drift.py`.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter
from tqdm import tqdm

from celestial_ml.data.images import decode_image
from celestial_ml.monitor.detectors import Detector, Promise
from celestial_ml.monitor.reference import FIGURES, GROUPS, ONE_SIDED, Reference, figures_of, logged_figures
from celestial_ml.planets.unknown_bodies import draw_body
from celestial_ml.serve.predictor import Predictor

BEFORE, AFTER, WINDOW = 1000, 1000, 200  # images; peers without an online detector look at windows
BODIES = "10 % of other bodies"


def jpeg(pixels: np.ndarray, quality: int = 20) -> np.ndarray:
    Image.fromarray(pixels).save(stored := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(stored))


CHANGES = {
    "blur, sigma 1.5": lambda pixels: np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.5))),
    "exposure -30 %": lambda pixels: (pixels * 0.7).astype(np.uint8),
    "JPEG, quality 20": jpeg,
}


def pools_of(run: Path) -> tuple[Reference, dict[str, pd.DataFrame]]:
    "The figures of the images that the run held out, as they are and changed."
    model, catalog = Predictor(run), pd.read_parquet(run / "features.parquet")
    learned, held_out = (
        [decode_image(Path(path)) for path in catalog.path[(catalog.split != "train") == held]]
        for held in (False, True)
    )
    pools = {"": logged_figures(model, held_out)}
    pools |= {name: logged_figures(model, map(change, held_out)) for name, change in CHANGES.items()}
    bodies = [draw_body(i, 128, np.random.default_rng(i)) for i in range(300)]
    return Reference("", pools[""], logged_figures(model, learned)), pools | {"bodies": logged_figures(model, bodies)}


def rows_of(
    pools: dict[str, pd.DataFrame], seed: int, change: str, images: int, reference: int
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    "Of a stream: the rows of its reference, then parts of the stream, each rows of a pool."
    rng, n = np.random.default_rng(seed), len(pools[""])
    first, before = rng.integers(n, size=reference), rng.integers(n, size=images)
    if not change:
        return first, [("", before)]
    if change == BODIES:
        parts = [
            ("bodies", rng.integers(len(pools["bodies"]), size=1))
            if rng.random() < 0.1
            else ("", rng.integers(n, size=1))
            for _ in range(AFTER)
        ]
    else:
        parts = [(change, rng.integers(len(pools[change]), size=AFTER))]
    return first, [("", before), *parts]


def streams(
    values: dict[str, np.ndarray], pools: dict[str, pd.DataFrame], change: str, count: int, images: int, reference: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    "References and streams, of whatever rows the pools have."
    for seed in range(count):
        first, parts = rows_of(pools, seed, change, images, reference)
        yield values[""][first], np.concatenate([values[pool][rows] for pool, rows in parts])


def delays_of(alarms: list[int | None], before: int = BEFORE) -> str:
    "Images from the change on; an alarm before it counts as never."
    late = np.array([np.inf if image is None or image <= before else image - before for image in alarms])
    return f"{np.median(late):.0f} ({np.mean(late <= 250):.0%})"


def ours(reference: np.ndarray, stream: np.ndarray) -> int | None:
    alarm = Detector(reference, GROUPS, ONE_SIDED, seed=int(reference.sum() * 1e6) % 2**31).look(stream)
    return alarm and alarm.image


def by_window(test: Callable[[np.ndarray, np.ndarray], bool]) -> Callable[[np.ndarray, np.ndarray], int | None]:
    "The end of the first window that a test calls drifted; a window begins where the change does."

    def first(reference: np.ndarray, stream: np.ndarray) -> int | None:
        ends = range(WINDOW, len(stream) + 1, WINDOW)
        return next((end for end in ends if test(reference, stream[end - WINDOW : end])), None)

    return first


def thresholds(reference: np.ndarray, window: np.ndarray) -> bool:
    "The guide's: Wasserstein's distance 0.3 of a figure, Jensen and Shannon's 0.1 of the classes, AUROC 0.7 of the embedding."
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import wasserstein_distance
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    n = len(FIGURES)
    if any(
        wasserstein_distance(a, b) / max(a.std(), 1e-9) > 0.3
        for a, b in zip(reference[:, :n].T, window[:, :n].T, strict=True)
    ):
        return True
    shares = [np.bincount(one[:, n].astype(int), minlength=100) / len(one) for one in (reference, window)]
    if jensenshannon(*shares, base=2) > 0.1:
        return True
    x, y = np.concatenate([reference[:, n + 2 :], window[:, n + 2 :]]), np.repeat([0, 1], [len(reference), len(window)])
    rng = np.random.default_rng(0).permutation(len(x))
    half = len(x) // 2
    model = LogisticRegression(max_iter=200).fit(x[rng[:half]], y[rng[:half]])
    return bool(roc_auc_score(y[rng[half:]], model.decision_function(x[rng[half:]])) > 0.7)


def peer(python: str, kind: str, cases: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> dict[str, list[int | None]]:
    "What another detector says of streams, in its own interpreter."
    with tempfile.TemporaryDirectory() as folder:
        arrays = {
            f"{name}|{i}|{part}": one[j]
            for name, some in cases.items()
            for i, one in enumerate(some)
            for j, part in enumerate(("reference", "stream"))
        }
        np.savez(Path(folder) / "streams.npz", **arrays)
        command = [python, str(Path(__file__).parent / "peer" / "drift.py"), kind, f"{folder}/streams.npz", str(WINDOW)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("output/guide"))
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--peer-streams", type=int, default=20)
    parser.add_argument("--evidently", help="an interpreter that has evidently 0.7.23")
    chosen = parser.parse_args(arguments)
    reference, pools = pools_of(chosen.run)
    scaled = {name: reference.values(table) for name, table in pools.items()}
    codes = {name: i for i, name in enumerate(sorted({*pools[""].label}))}
    plain = {
        name: np.column_stack([figures_of(t), t.label.map(codes).fillna(0), ~t.known, np.stack(t.embedding.tolist())])
        for name, t in pools.items()
    }  # figures, class, unknown, embedding
    print(
        f"{len(pools[''])} held-out images; at most {Promise().alpha:.0%} of streams of {Promise().images:,} may raise an alarm\n"
    )
    print(
        "| detector | false alarms | " + " | ".join(f"{name}: median, within 250" for name in (BODIES, *CHANGES)) + " |"
    )
    print("|---|---|" + "---|" * 4, flush=True)
    for size in (300, 60):
        began = time.process_time()
        quiet = tqdm(
            streams(scaled, pools, "", chosen.streams, Promise().images, size),
            f"reference of {size}",
            chosen.streams,
            file=sys.stderr,
        )
        false = sum(ours(*one) is not None for one in quiet)
        speed = chosen.streams * Promise().images / (time.process_time() - began)
        row = [
            delays_of([ours(*one) for one in streams(scaled, pools, name, 100, BEFORE, size)])
            for name in (BODIES, *CHANGES)
        ]
        print(
            f"| ours, {size} reference images | {false} of {chosen.streams} | "
            + " | ".join(row)
            + f" | <!-- {speed:,.0f} images/s -->",
            flush=True,
        )
    few = chosen.peer_streams
    cases = {
        name: [*streams(plain, pools, name, few, 0 if name else Promise().images, 300)]
        for name in ("", BODIES, *CHANGES)
    }
    answers = {
        "the guide's thresholds, windows of 200": {
            name: [by_window(thresholds)(*one) for one in some] for name, some in cases.items()
        }
    }
    for name, python in {"evidently": chosen.evidently}.items():
        if python:
            answers[name] = peer(
                python,
                name,
                {
                    key: [(a[:, : len(FIGURES) + 2], b[:, : len(FIGURES) + 2]) for a, b in some]
                    for key, some in cases.items()
                },
            )
    for name, alarms in answers.items():
        row = [delays_of(alarms[change], before=0) for change in (BODIES, *CHANGES)]
        print(f"| {name} | {sum(a is not None for a in alarms[''])} of {few} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
