"The command `celestial` with good and bad input, and what it costs to import."

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from celestial_ml.core.files import sha256_of, write_json
from celestial_ml.planets.renderer import render

HEAVY = {
    "tensorflow",
    "keras",
    "mlflow",
    "ploomber",
    "papermill",
    "sklearn",
    "matplotlib",
    "pandas",
    "gradio",
    "jupyter",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for body in ("Mars", "Neptune"):
        Image.fromarray(render(body, size=64)).save(folder / f"{body}.jpg")
    return folder


def test_predict_answers_for_files_and_folders(celestial, model: Path, pictures: Path) -> None:
    result = celestial("predict", pictures, "--model", model, "--json")
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["label"] for answer in answers] == ["Mars", "Neptune"]
    keys = {"path", "label", "confidence", "known", "ood_score", "probabilities", "model_version", "sha256"}
    assert all(answer.keys() == keys and answer["known"] for answer in answers)
    assert answers[0]["sha256"] == sha256_of(pictures / "Mars.jpg")
    spoken = celestial("predict", pictures / "Mars.jpg", "--model", model)
    assert re.search(r"Mars\.jpg: Mars \(\d+\.\d%\)", spoken.stdout)


def test_predict_imports_nothing_heavy(model: Path, pictures: Path) -> None:
    code = (
        "import sys; from celestial_ml.cli.app import app\n"
        f"try: app(['predict', {str(pictures)!r}, '--model', {str(model)!r}])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_serving_install_pulls_no_training_stack() -> None:
    "What `pip install celestial-ml` brings, followed through the requirements of everything that it brings."
    from packaging.requirements import Requirement

    waiting, seen = [("celestial-ml", "")], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            requires = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found = requirement.name.lower().replace("_", "-")
                waiting += [(found, chosen) for chosen in ("", *requirement.extras)]
    names = {name for name, _ in seen}
    assert {"onnxruntime", "gradio", "fastapi"} <= names
    heavy = {
        "tensorflow",
        "tensorflow-cpu",
        "keras",
        "mlflow",
        "ploomber",
        "papermill",
        "jupyterlab",
        "ipykernel",
        "dvc",
    }
    assert not names & heavy


def bad_files(folder: Path) -> dict[str, str]:
    "Files that are no pictures to answer for, each with a word of what is said of it."
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "letter.jpg").write_text("Dear sir or madam,")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    return {
        "truncated.jpg": "is damaged", "zero.jpg": "is empty", "letter.jpg": "not a JPEG, PNG or WebP",
        "one.png": "1 × 1 pixels", "huge.png": "of 50 million allowed", "animated.webp": "is animated",
    }  # fmt: skip


def test_a_bad_image_gets_an_error_and_the_others_an_answer(celestial, model: Path, tmp_path: Path) -> None:
    said = bad_files(tmp_path)
    result = celestial("predict", tmp_path, "--model", model, "--json")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert [Path(json.loads(line)["path"]).name for line in result.stdout.splitlines()] == ["whole.jpg"]
    for name, words in said.items():
        assert any(name in line and words in line for line in result.stderr.splitlines()), (name, result.stderr)


def test_unusual_but_good_images_are_answered(celestial, model: Path, tmp_path: Path) -> None:
    mars = Image.fromarray(render("Mars", size=64))
    mars.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    mars.convert("RGBA").save(tmp_path / "alpha.png")
    mars.convert("L").save(tmp_path / "gray.png")
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(tmp_path / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    mars.save(tmp_path / "turned.jpg", exif=exif)
    result = celestial("predict", tmp_path, "--model", model, "--json")
    assert result.returncode == 0, result.stderr
    answers = {Path(a["path"]).stem: a for a in map(json.loads, result.stdout.splitlines())}
    assert all(answers[name]["label"] == "Mars" for name in ("cmyk", "alpha", "turned")) and len(answers) == 5


def test_wrong_requests(celestial_here, model: Path, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in [
        (["predict", tmp_path / "empty", "--model", model], "there is no image in"),
        (["predict", tmp_path / "nowhere.jpg", "--model", model], "there is no"),
        (["predict", pictures, "--model", "nonsense"], "is not a packaged model"),
        (["predict", pictures], "there is no model yet"),
        (["serve"], "there is no model yet"),
        (["data", "get", "gide"], "Allowed: guide"),
        (["data", "check", tmp_path / "empty"], "holds no class folder with images"),
        (["data", "check", tmp_path / "nowhere"], "is not a folder"),
    ]:
        result = celestial_here(*arguments)
        assert result.returncode == 2 and words in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_outside_of_a_project(celestial, tmp_path: Path) -> None:
    result = celestial("run", cwd=tmp_path)
    assert result.returncode == 2 and "not inside a celestial_ml project" in result.stderr


def test_data_check_and_show(celestial, tmp_path: Path) -> None:
    for body in ("Mars", "Moon"):
        (tmp_path / "images" / body).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(render(body, size=32, seed=i)).resize((32 + i, 32)).save(
                tmp_path / "images" / body / f"{i}.png"
            )
    good = celestial("data", "check", tmp_path / "images", "--json")
    assert good.returncode == 0, good.stderr
    assert {finding["status"] for finding in json.loads(good.stdout)} <= {"pass", "warn"}
    sheet = tmp_path / "sheet.png"
    assert celestial("data", "show", tmp_path / "images", "--output", sheet).returncode == 0
    assert Image.open(sheet).width > 100
    for path in sorted((tmp_path / "images/Moon").iterdir())[1:]:
        path.unlink()
    bad = celestial("data", "check", tmp_path / "images")
    assert bad.returncode == 1 and "Moon has 1" in bad.stderr


def test_dvc_compares_two_revisions(project: Path) -> None:
    "`dvc metrics|params|plots diff` between a commit and what lies there now."
    run = project / "results/default"
    (run / "plots").mkdir(parents=True)

    def leave(accuracy: float, brightness: int) -> None:
        write_json(run / "headline.json", {"accuracy": accuracy})
        for name in ("confusion_matrix", "history", "preview"):
            Image.new("L", (8, 8), brightness).save(run / "plots" / f"{name}.png")

    def call(*command: str) -> str:
        env = os.environ | {"GIT_AUTHOR_NAME": "a", "GIT_COMMITTER_NAME": "a", "EMAIL": "a@example.org"}
        result = subprocess.run(command, cwd=project, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr
        return result.stdout

    leave(0.5, 0)
    call("git", "init", "-q")
    call("git", "add", "-A")
    assert "results/default/headline.json" in call("git", "ls-files")
    call("git", "commit", "-qm", "one")
    leave(0.75, 255)
    params = project / "params/default.yaml"
    params.write_text(params.read_text().replace("epochs: 40", "epochs: 50"))
    dvc = [sys.executable, "-m", "dvc"]
    assert '"diff": 0.25' in call(*dvc, "metrics", "diff", "--json")
    assert '"new": 50' in call(*dvc, "params", "diff", "--json")
    call(*dvc, "plots", "diff", "--out", "compared")
    pictures = {path.name for path in (project / "compared/static").iterdir()}
    assert {f"{rev}_results_default_plots_preview.png" for rev in ("HEAD", "workspace")} <= pictures
    assert not re.search(r"""src=["']?http""", (project / "compared/index.html").read_text()), "no network"
