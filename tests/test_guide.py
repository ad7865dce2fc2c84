"The guide's data set: the pointer, the copy, and DVC's own import, with a git repository made on the spot."

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from programs import git

from celestial_ml.core.files import read_json
from celestial_ml.core.params import Data
from celestial_ml.data.catalog import guide_split, make_catalog, with_split
from celestial_ml.data.guide import dvc_checksum, expected, get_guide
from celestial_ml.planets.renderer import render

ROOT = Path(__file__).resolve().parent.parent
DVC = [sys.executable, "-m", "dvc"]


def test_pointer_is_the_guides() -> None:
    pointer = yaml.safe_load((ROOT / "data/raw.dvc").read_text())
    assert pointer["deps"][0] == {
        "path": "raw",
        "repo": {
            "url": "https://github.com/swiss-ai-center/a-guide-to-mlops",
            "rev": "data",
            "rev_lock": "0f2d05ddb320ffd71d965c9a924c848d5df8ba45",
        },
    }
    out = pointer["outs"][0]
    assert out["md5"] == "648bf1fb9f622256f3f642e3e0927a24.dir" and (out["nfiles"], out["size"]) == (1500, 9260297)


def test_a_copy_is_verified_and_taken(guide_images: Path, tmp_path: Path) -> None:
    (tmp_path / "raw.dvc").write_bytes((ROOT / "data/raw.dvc").read_bytes())
    folder = get_guide(tmp_path, copy=guide_images)
    assert dvc_checksum(folder) == expected(tmp_path / "raw.dvc")["checksum"]
    assert len(list(folder.rglob("*.jpg"))) == 1500


def test_the_guides_split_is_that_of_keras(guide_images: Path) -> None:
    import keras

    catalog = make_catalog(guide_images)
    split = guide_split(catalog, 0.2, seed=77)
    theirs = keras.utils.image_dataset_from_directory(
        guide_images, validation_split=0.2, subset="validation", seed=77, shuffle=True, image_size=(32, 32)
    ).file_paths
    assert set(catalog.path[split == "val"]) == {Path(path).as_posix() for path in theirs} and len(theirs) == 300


def test_the_held_out_images_are_no_duplicates_of_learned_ones(guide_images: Path) -> None:
    catalog = with_split(make_catalog(guide_images), Data(), 7)
    assert catalog.groupby("sha256").split.nunique().max() == 1
    assert catalog.split.value_counts().to_dict() == {"train": 980, "test": 300, "val": 220}


def instead_of(home: Path, url: str, other: str) -> Path:
    "A home folder in which git goes elsewhere for a URL; DVC reads the file, not git's environment variables."
    home.mkdir(exist_ok=True)
    (home / ".gitconfig").write_text(f'[url "{other}"]\n    insteadOf = {url}\n')
    return home


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    "A git repository with images on a branch, as the guide's is."
    from PIL import Image

    repository = tmp_path / "upstream"
    for body in ("Mars", "Saturn"):
        (repository / "raw" / body).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(render(body, size=32, seed=i)).save(repository / "raw" / body / f"{i}.png")
    git(repository, "init", "-q", "-b", "data")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "images")
    return repository


def test_dvc_fetches_what_the_pointer_points_to(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "The path of `celestial data get guide` with a network: a real `dvc import`, a fresh clone, a real `dvc pull`."
    url = "https://example.org/guide"
    monkeypatch.setenv("HOME", str(instead_of(tmp_path / "home", url, upstream.as_uri())))
    monkeypatch.delenv("CELESTIAL_GUIDE_DATA", raising=False)
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    git(project, "init", "-q")
    subprocess.run([*DVC, "init", "-q"], cwd=project, check=True)
    subprocess.run([*DVC, "import", "-q", url, "raw", "-o", "data/raw", "--rev", "data"], cwd=project, check=True)
    assert expected(project / "data/raw.dvc")["rev"] == git(upstream, "rev-parse", "HEAD")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "import")

    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    assert not (clone / "data/raw").exists()
    folder = get_guide(clone / "data")
    assert dvc_checksum(folder) == dvc_checksum(upstream / "raw")


def test_offline_and_without_a_copy_the_error_names_both_ways(celestial, project: Path, tmp_path: Path) -> None:
    git(project, "init", "-q")
    nowhere = instead_of(tmp_path / "home", "https://github.com/", "file:///nowhere/")
    result = celestial("data", "get", "guide", HOME=str(nowhere))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "could not be reached" in result.stderr
    assert "--from FOLDER" in result.stderr and "CELESTIAL_GUIDE_DATA" in result.stderr
    assert not (project / "data/raw").exists()


def test_another_folder_is_not_accepted_as_the_guides(celestial, project: Path, tmp_path: Path) -> None:
    (tmp_path / "Mars").mkdir()
    (tmp_path / "Mars/a.jpg").write_bytes(b"")
    result = celestial("data", "get", "guide", "--from", tmp_path)
    assert result.returncode == 2 and "is not the guide's data set" in result.stderr
    assert not (project / "data/raw").exists()


@pytest.mark.slow
def test_guide_baseline_reproduces_the_guides_figure(celestial, project: Path, guide_images: Path) -> None:
    "The guide's network, parameters and split reach about what the guide reaches: 0.39; seeds move it by some 0.07."
    result = celestial("run", "guide-baseline", "--json", CELESTIAL_GUIDE_DATA=str(guide_images))
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout.splitlines()[-1])["metrics"]
    assert metrics["images"] == 300 and metrics["split"] == "val"
    assert metrics["accuracy"] == pytest.approx(0.40, abs=0.09)
    history = pd.read_csv(project / "output/guide-baseline/history.csv")
    assert history.val_accuracy.iloc[-1] == pytest.approx(metrics["accuracy"], abs=1e-4)
    assert not read_json(project / "output/guide-baseline/register.json")["promoted"]


@pytest.mark.slow
def test_default_network_is_right_on_the_guides_images(celestial, project: Path, guide_images: Path) -> None:
    result = celestial("run", "guide", "--json", CELESTIAL_GUIDE_DATA=str(guide_images))
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout.splitlines()[-1])["metrics"]
    assert metrics["accuracy"] >= 0.98, metrics
    probabilities = np.stack(pd.read_parquet(project / "output/guide/predictions.parquet").probabilities.tolist())
    assert np.allclose(probabilities.sum(1), 1)
