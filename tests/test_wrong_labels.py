"Wrong labels that are planted among right ones are what the step `evaluate` suspects."

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from celestial_ml.core.files import read_json
from celestial_ml.flow.pipeline import execute, make_plan

IMAGES, PLANTED = 900, 30
SETTINGS = (
    "data.source=folder data.folder=digits prepare.size=32 model.network=compact train.augment=none "
    "model.width=16 model.embedding=32 train.epochs=8 evaluate.ood_images=4 evaluate.bootstrap=100"
)


def test_planted_wrong_labels_are_suspected(at_home: Path) -> None:
    rng, digits = np.random.default_rng(7), load_digits()
    truth, planted = digits.target[:IMAGES], rng.choice(IMAGES, PLANTED, replace=False)
    labels = truth.copy()
    labels[planted] = (labels[planted] + rng.integers(1, 10, PLANTED)) % 10
    for row, (image, label) in enumerate(zip(digits.images, labels, strict=False)):
        folder = at_home / "digits" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).resize((32, 32), Image.Resampling.NEAREST).save(
            folder / f"{row}.png"
        )
    execute(make_plan(at_home, "default", SETTINGS.split(), run="digits", until="evaluate"), quiet=True)
    suspects = read_json("output/digits/metrics.json")["suspected_labels"]
    rows = {int(Path(suspect["path"]).stem): suspect for suspect in suspects}
    found = rows.keys() & set(planted.tolist())
    assert len(found) >= 0.8 * PLANTED and len(found) >= 0.5 * len(rows), (len(found), len(rows))
    assert all(rows[row]["given"] == str(labels[row]) for row in found)
    assert np.mean([rows[row]["suggested"] == str(truth[row]) for row in found]) > 0.8
