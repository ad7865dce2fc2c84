"A label that nobody had used is enough for a new class: the pipeline follows, and the old classes stay as good."

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from celestial_ml.core.files import read_json, sha256_of
from celestial_ml.flow.pipeline import execute, make_plan
from celestial_ml.label.labelled import write_labelled
from celestial_ml.label.store import Judgement, propose

SETTINGS = (
    "data.source=folder data.folder=digits prepare.size=32 model.network=compact train.augment=none "
    "evaluate.ood_images=4 evaluate.bootstrap=100"
)


def file_of(image: np.ndarray) -> bytes:
    "A digit as a PNG."
    file = io.BytesIO()
    Image.fromarray((image * 15).astype(np.uint8)).resize((32, 32), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_a_label_that_nobody_had_used_is_a_new_class(at_home: Path) -> None:
    digits = load_digits()
    for row in range(700):
        folder = at_home / "digits" / str(digits.target[row])
        if digits.target[row] < 9:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row}.png").write_bytes(file_of(digits.images[row]))
    execute(
        make_plan(at_home, "default", [*SETTINGS.split(), "train.epochs=8"], run="before", until="evaluate"), quiet=True
    )
    before = read_json("output/before/metrics.json")["per_class"]

    nines = {sha256_of(one): one for one in map(file_of, digits.images[digits.target == 9][:60])}
    for who in ("anna", "bert"):
        propose([Judgement(sha256, "nine", who, "page") for sha256 in nines], nines, people=2)
    assert write_labelled(at_home)["accepted"] == len(nines)
    more = ["data.sources=[folder, labelled]", "train.start_from=before", "train.epochs=5"]
    plan = make_plan(at_home, "default", [*SETTINGS.split(), *more], run="after", until="evaluate")
    execute(plan, quiet=True)
    after = read_json("output/after/metrics.json")["per_class"]
    assert after.keys() - before.keys() == {"nine"} and read_json("output/after/train.json")["classes"][-1] == "nine"
    old = [np.mean([figures[name]["recall"] for name in before]) for figures in (before, after)]
    print(f"recall of the old classes before and after: {old}, of the new one: {after['nine']['recall']}")
    assert old[1] >= old[0] - 0.03 and after["nine"]["recall"] >= 0.8
    again = make_plan(at_home, "default", [*SETTINGS.split(), *more], run="after", until="evaluate")
    assert not again.stale
    (at_home / "output/before/model.keras").write_bytes(b"another network")
    again = make_plan(at_home, "default", [*SETTINGS.split(), *more], run="after", until="evaluate")
    assert "train" in again.stale, "the network that it begins with is an input"
