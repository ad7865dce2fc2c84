"""The promise of the drift detector, tried: false alarms where nothing changes, and images until a change is noticed.

On the images that the run held out, with the figures that a server logs. Pictures are drawn with replacement, so that reference and
stream come from one distribution. Peers see the same streams, in their own interpreters: `bench/peer/drift.py`.
"""

import io
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from bench import ABSENT, Growth, Row, environment
from celestial_ml.data.images import decode_image
from celestial_ml.monitor.detectors import Detector, Promise
from celestial_ml.monitor.log import open_log
from celestial_ml.monitor.reference import FIGURES, GROUPS, ONE_SIDED, Reference, figures_of, logged_figures
from celestial_ml.planets.unknown_bodies import draw_body
from celestial_ml.serve.guard import new_request_id
from celestial_ml.serve.predictor import Predictor

BEFORE, AFTER, WINDOW = 1000, 1000, 200  # images; peers without an online detector look at windows
BODIES = "10 % of other bodies"
WHY = "The limit is told which change will come, by all of its images; a detector that isn't has to learn it from the stream."


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


def median_delay(alarms: list[int | None], before: int = BEFORE) -> float:
    "Images from the change on; an alarm before it, or none, counts as one at the stream's end."
    return float(np.median([AFTER if image is None or image <= before else image - before for image in alarms]))


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


def peer(python: Path, kind: str, cases: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> dict[str, list[int | None]]:
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


def ratios(values: dict[str, np.ndarray], change: str) -> dict[str, np.ndarray]:
    "Logarithms of how much likelier each image is after a change than before, by pool: what no detector can know."
    after = "bodies" if change == BODIES else change
    x, labels = np.concatenate([values[""], values[after]]), np.repeat([0, 1], [len(values[""]), len(values[after])])
    model = make_pipeline(PolynomialFeatures(2), StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, labels)
    prior = np.log(labels.mean() / (1 - labels.mean()))
    logs = {pool: model.decision_function(rows) - prior for pool, rows in values.items()}
    if change == BODIES:
        logs = {pool: np.log(0.9 + 0.1 * np.exp(one)) for pool, one in logs.items()}
    return {pool: one[:, None] for pool, one in logs.items()}


def oracle(values: dict[str, np.ndarray], pools: dict[str, pd.DataFrame], change: str, count: int) -> list[int | None]:
    "Alarms of the quickest detector there is at the same share of false ones. Source: Page 1954 (CUSUM), Moustakides 1986."
    logs = ratios(values, change)

    def evidence(some: Iterator[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        sums = [np.concatenate([[0.0], stream[:, 0].cumsum()]) for _, stream in some]
        return [(one - np.minimum.accumulate(one))[1:] for one in sums]

    calm = evidence(streams(logs, pools, "", 200, Promise().images, 1))
    threshold = np.quantile([one.max() for one in calm], 1 - Promise().alpha)
    return [
        BEFORE + 1 + int(over[0]) if len(over := np.flatnonzero(one[BEFORE:] > threshold)) else None
        for one in evidence(streams(logs, pools, change, count, BEFORE, 1))
    ]


def log_growth(sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)) -> Growth:
    "Seconds of storing so many answers in a new prediction log, by the thread that does it in the service."
    rng, seconds = np.random.default_rng(0), list[float]()
    row = {"label": "Mars", "confidence": 0.9, "known": True, "ood_score": 0.1, "model_version": "bench/1"}
    row |= {"role": "champion", "width": 128, "height": 128, "format": "JPEG", "bytes": 7000, "latency_ms": 1.0}
    row |= {"embedding": rng.random(64), "probabilities": rng.random(10), "classes": tuple(map(str, range(10)))}
    row |= dict.fromkeys(("brightness", "contrast", "sharpness"), 0.5)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            log = open_log(f"sqlite:///{folder}/predictions.db")
            began = time.perf_counter()
            for i in range(size):
                log.record(row | {"request_id": new_request_id(), "time": time.time(), "sha256": f"{i:064x}"})
                if i % 10_000 == 9_999 and not log.flush(60):
                    raise RuntimeError(f"the log stands still: {log.status()}")
            seconds.append(time.perf_counter() - began)
            assert log.status()["written"] == size, log.status()
            log.close()
    return Growth("answers into the prediction log", list(sizes), seconds)


def drift_rows(run: Path, quick: bool) -> list[Row | Growth]:
    "Streams without an alarm where nothing changes; images until a change is noticed; the log as it grows."
    many, few = (20, 2) if quick else (200, 10)
    reference, pools = pools_of(run)
    scaled = {name: reference.values(table) for name, table in pools.items()}
    codes = {name: i for i, name in enumerate(sorted({*pools[""].label}))}
    plain = {
        name: np.column_stack([figures_of(t), t.label.map(codes).fillna(0), ~t.known, np.stack(t.embedding.tolist())])
        for name, t in pools.items()
    }  # figures, class, unknown, embedding
    cases = {
        name: [*streams(plain, pools, name, few, 0 if name else Promise().images, 300)]
        for name in ("", BODIES, *CHANGES)
    }
    others = {
        f"the guide's thresholds, windows of {WINDOW}": {
            name: [by_window(thresholds)(*one) for one in some] for name, some in cases.items()
        }
    }
    if python := environment("evidently"):
        known = {
            name: [(a[:, : len(FIGURES) + 2], b[:, : len(FIGURES) + 2]) for a, b in some]
            for name, some in cases.items()
        }
        others[f"Evidently, windows of {WINDOW}"] = peer(python, "evidently", known)
    ABSENT["alibi-detect 0.13"] = (
        "its online detector sets its limits by ten bootstraps for each image of the run that it expects: a minute of the processor "
        "for 500 images, 40 minutes for 20,000, and for each reference anew"
    )
    calm = {name: [float(np.mean([alarm is None for alarm in alarms[""]]))] for name, alarms in others.items()}
    rows: list[Row | Growth] = [log_growth((1_000, 10_000) if quick else (10_000, 100_000, 1_000_000))]
    for size in (300, 60):
        quiet = [ours(*one) is None for one in streams(scaled, pools, "", many, Promise().images, size)]
        what = f"streams of {Promise().images:,} images without an alarm where nothing changes, {size} reference images"
        promised = {"promised": [1 - Promise().alpha]}
        rows.append(Row(what, "share", [float(np.mean(quiet))], calm, promised, limit_goal=1.0))
    for change in (BODIES, *CHANGES):
        delay = median_delay([ours(*one) for one in streams(scaled, pools, change, many, BEFORE, 300)])
        beside = {name: [median_delay(alarms[change], before=0)] for name, alarms in others.items()}
        least = {"CUSUM that knows both distributions": [median_delay(oracle(scaled, pools, change, many))]}
        rows.append(Row(f"{change}, until it's noticed", "images", [delay], beside, least, 1.0, 0.5, WHY))
    return rows
