"Planted faults are found, and nothing is where none was planted."

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from bench.data import wrong_labels
from bench.planted import KINDS, PICTURES, found, plant
from celestial_ml.core.params import Check, Data
from celestial_ml.data.catalog import make_catalog, with_split
from celestial_ml.data.examine import Examination
from celestial_ml.flow.reference import check_batch
from celestial_ml.planets.renderer import View, render


def planets(folder: Path, each: int = 40) -> Path:
    "Renders that differ: bodies with features, from all sides, no two views near each other."
    for body in ("Earth", "Mars", "Jupiter", "Moon", "Pluto"):
        (folder / body).mkdir(parents=True)
        for i in range(each):
            view = View(longitude_deg=360 * i / each, latitude_deg=90 * (i * 0.618 % 1) - 45)
            Image.fromarray(render(body, view, size=96)).save(folder / body / f"{i:03}.png")
    return folder


def digits(folder: Path, count: int = 700) -> Path:
    "Handwritten digits."
    data = load_digits()
    for i, (image, label) in enumerate(zip(data.images[:count], data.target, strict=False)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        small = Image.fromarray((image * 15.9).astype(np.uint8))
        small.resize((32, 32), Image.Resampling.BILINEAR).save(folder / str(label) / f"{i:04}.png")
    return folder


def examined(folder: Path) -> Examination:
    catalog = with_split(make_catalog(folder, folder), Data(), 7)
    return check_batch(catalog, folder, Check(reference="none"))


@pytest.mark.parametrize("make", [planets, digits], ids=["planets", "digits"])
def test_planted_faults_are_found_and_no_others(tmp_path: Path, make) -> None:
    folder = make(tmp_path / "set")
    clean = {f.check: f.total for f in examined(folder).findings if f.status != "pass"}
    assert not clean, clean
    planted = plant(folder, each=1)
    counts = found(planted, examined(folder).findings)
    missed = {kind for kind, n in counts.items() if n < 1}
    assert len(KINDS) >= 15 and len(PICTURES) > 10
    assert not missed


@pytest.mark.parametrize("make", [planets, digits], ids=["planets", "digits"])
def test_wrong_labels_are_suspected(tmp_path: Path, make) -> None:
    "Of one in 20 that is wrong four fifths are suspects, and half of the suspects are wrong."
    planted, found_, suspected = wrong_labels(make(tmp_path / "set"), seed=1)
    assert planted >= 10 and found_ >= 0.8 * planted and found_ >= 0.5 * suspected, (planted, found_, suspected)


def test_the_command_writes_a_page_and_compares(celestial, tmp_path: Path) -> None:
    folder = planets(tmp_path / "set", each=8)
    out = tmp_path / "out"
    good = celestial("data", "check", folder, "--output", out, "--reference", "none")
    assert good.returncode == 0 and "checks.html" in good.stdout, good.stderr
    Image.new("RGB", (96, 96)).save(folder / "Mars/black.png")
    (folder / "Mars/empty.png").touch()
    bad = celestial("data", "check", folder, "--output", out, "--reference", "none")
    assert bad.returncode == 1 and "Mars/empty.png" in bad.stderr
    written, page = json.loads((out / "checks.json").read_text()), (out / "checks.html").read_text()
    statuses = {f["check"]: f["status"] for f in written["findings"]}
    assert (written["verdict"], statuses["readable"], statuses["not_blank"]) == ("fail", "fail", "warn")
    assert "Mars/black.png" in page and "data:image/webp" in page
    gone = celestial("data", "check", folder, "--reference", "nowhere")
    assert gone.returncode == 2 and "nowhere" in gone.stderr and "Traceback" not in gone.stderr


def test_skew_against_a_run_stops_or_warns(celestial, tmp_path: Path) -> None:
    learned = planets(tmp_path / "learned", each=20)
    assert celestial("data", "check", learned, "--reference", "none").returncode == 0  # in output/checks
    for name, changed in {
        "gray": lambda image: image.convert("L"),
        "dark": lambda image: image.point(lambda v: v // 2),
    }.items():
        for path in learned.rglob("*.png"):
            copy = tmp_path / name / path.relative_to(learned)
            copy.parent.mkdir(parents=True, exist_ok=True)
            changed(Image.open(path)).save(copy)
    gray, dark = (
        celestial("data", "check", tmp_path / name, "--reference", "checks", "--output", tmp_path / f"of {name}")
        for name in ("gray", "dark")
    )
    assert gray.returncode == 1 and "gray and coloured" in gray.stderr and "of gray/checks.html" in gray.stderr
    assert dark.returncode == 0 and "how pictures look" in dark.stdout, dark.stdout + dark.stderr
