"""The promise of the drift detector, tried: false alarms where nothing changes, and images until a change is noticed.

`python -m bench.drift [--run output/guide] [--streams 200]`, from the project's folder, on the images that the run held out.
Pictures are drawn with replacement, so that reference and stream come from one distribution.
"""

import argparse
import io
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter
from tqdm import tqdm

from celestial_ml.data.features import image_features
from celestial_ml.data.images import decode_image
from celestial_ml.monitor.detectors import Alarm, ClassScale, Detector, Promise
from celestial_ml.planets.unknown_bodies import draw_body
from celestial_ml.serve.predictor import Predictor

STATISTICS = ["brightness", "contrast", "sharpness", "lit", "red", "blue", "confidence"]
GROUPS = {"unknown": ["unknown"], "statistics": STATISTICS, "embedding": ["ood_score"]}
REFERENCE, BEFORE, AFTER = 300, 1000, 1000  # images


def jpeg(pixels: np.ndarray, quality: int = 20) -> np.ndarray:
    Image.fromarray(pixels).save(stored := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(stored))


CHANGES = {
    "blur, sigma 1.5": lambda pixels: np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.5))),
    "exposure -30 %": lambda pixels: (pixels * 0.7).astype(np.uint8),
    "JPEG, quality 20": jpeg,
}


def figures(model: Predictor, pictures: list[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    "What the detector looks at, and the model's answers."
    rows, answers = [], []
    for pixels in pictures:
        Image.fromarray(pixels).save(stored := io.BytesIO(), "PNG")
        answer, statistics = model.predict(stored.getvalue()), image_features(pixels)
        doubt = np.log10(1 - answer.confidence + 1e-6)
        rows.append([not answer.known, *(statistics[name] for name in STATISTICS[:-1]), doubt, answer.ood_score])
        answers.append(answer.label)
    return np.array(rows, float), answers


def scaled(scale: ClassScale, rows: np.ndarray, answers: list[str]) -> np.ndarray:
    "All but the unknown flag, by class."
    return np.column_stack([rows[:, :1], scale(rows[:, 1:], answers)])


def watch(pool: np.ndarray, seed: int, before: int, after: np.ndarray | None = None) -> Alarm | None:
    "A detector on images of the pool, then on others."
    rng = np.random.default_rng(seed)
    detector = Detector(pool[rng.integers(len(pool), size=REFERENCE)], GROUPS, ["unknown", "ood_score"], seed=seed)
    alarm = detector.look(pool[rng.integers(len(pool), size=before)])
    return alarm if alarm or after is None else detector.look(after[rng.permutation(len(after))])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("output/guide"))
    parser.add_argument("--streams", type=int, default=200)
    chosen = parser.parse_args(arguments)
    model, catalog = Predictor(chosen.run), pd.read_parquet(chosen.run / "features.parquet")
    splits = {
        held: [decode_image(Path(path)) for path in catalog.path[(catalog.split != "train") == held]]
        for held in (False, True)
    }
    training, answers = figures(model, splits[False])
    scale = ClassScale(training[:, 1:], answers)
    pool = scaled(scale, *figures(model, splits[True]))
    print(f"{len(pool)} held-out images; at most {Promise().alpha:.0%} of streams may raise an alarm\n")
    streams = tqdm(range(chosen.streams), "streams without a change", file=sys.stderr)
    false = sum(watch(pool, seed, Promise().images) is not None for seed in streams)
    print(f"false alarms: {false} of {chosen.streams} streams of {Promise().images:,} images")
    bodies = scaled(scale, *figures(model, [draw_body(i, 128, np.random.default_rng(i)) for i in range(300)]))
    changed = {name: scaled(scale, *figures(model, list(map(f, splits[True])))) for name, f in CHANGES.items()}
    for name in ("10 % of other bodies", *changed):
        delays, seen = [], Counter()
        for seed in range(100):
            rng = np.random.default_rng([seed, 1])
            after = changed.get(name, pool)[rng.integers(len(pool), size=AFTER)]
            if name not in changed:
                strange = rng.random(AFTER) < 0.1
                after = np.where(strange[:, None], bodies[rng.integers(len(bodies), size=AFTER)], after)
            alarm = watch(pool, seed, BEFORE, after)
            delays.append(alarm.image - BEFORE if alarm else np.inf)
            seen[alarm.column if alarm else "nothing"] += 1
        within = np.mean(np.array(delays) <= 250)
        print(f"{name}: {np.median(delays):.0f} images, {within:.0%} within 250; first by {seen.most_common(2)}")


if __name__ == "__main__":
    main()
