"`celestial data render`: pictures of a body at a phase, with and without a person's maps; what can't be drawn."

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from celestial_ml.cli.app import app

SMALL = ("--count", "2", "--size", "32")


def celestial(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_crescents(here: Path) -> None:
    result = celestial("data", "render", "--bodies", "saturn,Ceres", "--phase", "100:140", *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"folder": "rendered", "images": 4, "maps": {"Saturn": 0, "Ceres": 0}}
    views = pd.read_csv(here / "rendered" / "metadata.csv")
    assert views.phase_deg.between(100, 140).all() and views.phase_deg.nunique() == 4
    assert sorted(views.file_name) == sorted(f.relative_to(here / "rendered").as_posix() for f in here.rglob("*.jpg"))
    full = celestial("data", "render", "--bodies", "Saturn", "--phase", "0", *SMALL, "--output", "full")
    assert full.exit_code == 0
    dark, bright = (np.asarray(Image.open(here / f / "Saturn/Saturn_0000.jpg")).mean() for f in ("rendered", "full"))
    assert dark < 0.8 * bright


def test_the_same_seed_draws_the_same_pictures(here: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        celestial("data", "render", "--bodies", "Mars", *SMALL, "--seed", seed, "--output", name)
    a, b, c = ((here / name / "Mars/Mars_0001.jpg").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_maps_of_a_person(here: Path, suffix: str) -> None:
    (here / "maps").mkdir()
    Image.new("RGB", (200, 100), (0, 255, 0)).save(here / f"maps/2k_saturn.{suffix}")
    Image.new("RGB", (300, 30)).save(here / "maps/saturn_rings.png")
    result = celestial("data", "render", "--bodies", "Saturn,Mars", "--phase", "20", "--maps", "maps", *SMALL)
    assert result.exit_code == 0 and "Mars" in result.stderr
    for name in ("0000", "0001"):
        red, green, _ = np.asarray(Image.open(here / f"rendered/Saturn/Saturn_{name}.jpg")).reshape(-1, 3).max(axis=0)
        assert green > 1.1 * red


@pytest.mark.parametrize(
    "options",
    [
        ("--bodies", "Vulcan"),
        ("--bodies", ","),
        ("--phase", "181"),
        ("--phase", "140:100"),
        ("--phase", "thin"),
        ("--phase", "nan"),
        ("--count", "0"),
        ("--size", "4"),
        ("--seed", "-1"),
        ("--maps", "nowhere"),
        ("--maps", "empty"),
        ("--maps", "square"),
        ("--maps", "broken"),
        ("--maps", "moon", "--bodies", "Mars"),
        ("--output", "moon"),
        ("--output", "moon/moon.png"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_drawn_ends_in_an_error(here: Path, options: tuple[str, ...]) -> None:
    for name in ("empty", "square", "broken", "moon"):
        (here / name).mkdir()
    Image.new("RGB", (64, 64)).save(here / "square/mars.png")
    Image.new("RGB", (64, 32)).save(here / "moon/moon.png")
    (here / "broken/mars.jpg").write_bytes((here / "moon/moon.png").read_bytes()[:60])
    result = celestial("data", "render", *SMALL, *options)
    assert result.exit_code == 2 and "Traceback" not in result.stderr and result.stderr
    assert not (here / "rendered").exists() and (here / "moon/moon.png").is_file(), "nothing is written or replaced"
    assert not list(here.glob(".*"))
