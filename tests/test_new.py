"`celestial new`: a whole project, of other classes, from a clone and from a wheel; and nothing at all for a mistake."

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from glob import glob
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw
from test_readme import snapshot
from typer.testing import CliRunner

from celestial_ml.cli.app import app
from celestial_ml.core.params import load_params
from celestial_ml.flow.pipeline import make_plan
from celestial_ml.flow.steps import load_tasks
from celestial_ml.workbench.new_project import new_project

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# What only a project about worlds would say. The strange worlds that a model is shown to see if it calls them unknown are
# told by their code.
WORLDS = r"planet|\bmoon\b|saturn|jupiter|celestial bod|\bbody\b|swiss"


def shapes(folder: Path, count: int) -> Path:
    "Three classes of coloured shapes."
    for kind, colour in (("circle", "red"), ("square", "green"), ("triangle", "blue")):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            picture = Image.new("RGB", (64 + i, 80), (240, 240, 200 + i))
            x, y, r = 32 + i / 2, 38 + i % 5, 18 + i % 7
            pen = ImageDraw.Draw(picture)
            if kind == "circle":
                pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            elif kind == "square":
                pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
            else:
                pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
            picture.save(folder / kind / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A new project, as the command makes it."
    folder = tmp_path_factory.mktemp("new") / "my-pets"
    told = CliRunner().invoke(app, ["new", str(folder), "--classes", "cat,golden retriever,Äffchen", "--size", "96"])
    assert told.exit_code == 0, told.output
    assert told.output.splitlines()[-1] == f"next:  cd {folder} && make run"
    return folder


def files_in(folder: Path) -> dict[str, str]:
    "Every text of a project, but for the lock."
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "requirements.lock"]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def test_everything_is_there(pets: Path) -> None:
    made = files_in(pets)
    for name in (
        "Makefile",
        "README.md",
        "pyproject.toml",
        "settings.ini",
        "pipeline.yaml",
        ".gitignore",
        ".copier-answers.yml",
    ):
        assert name in made
    assert {
        "params/default.yaml",
        "params/smoke.yaml",
        "tests/test_project.py",
        ".github/workflows/ci.yml",
    } <= made.keys()
    assert {f"data/images/{name}/.gitkeep" for name in ("cat", "golden retriever", "Äffchen")} <= made.keys()
    assert not any(
        "{{" in text.replace("{{out}}", "").replace("${{", "") for text in made.values() if "output" not in text
    )
    assert not any(path.is_symlink() for path in pets.rglob("*"))


def test_steps_are_this_projects_own(pets: Path) -> None:
    for path in (ROOT / "nbs/steps").glob("*.ipynb"):
        assert (pets / "nbs/steps" / path.name).read_bytes() == path.read_bytes()
    assert (pets / "pipeline.yaml").read_bytes() == (ROOT / "pipeline.yaml").read_bytes()
    assert all((pets / task.source).is_file() for task in load_tasks(pets, "default").values())


def test_parameters_are_valid_and_complete(pets: Path) -> None:
    params = load_params("default", folder=pets / "params")
    assert (params.data.source, params.data.folder, params.prepare.size) == ("folder", "data/images", 96)
    assert params.register_.name == params.track.experiment == "my-pets"
    assert load_params("smoke", folder=pets / "params").train.epochs == 2
    keys = re.compile(r"^ *[a-z_.]+:", re.M)
    here, there = ((root / "params/default.yaml").read_text() for root in (ROOT, pets))
    assert keys.findall(there) == keys.findall(here), "every parameter has its line"


def test_it_knows_nothing_of_planets(pets: Path) -> None:
    ours = re.compile(r"share_on_body|upright.*photo.*sky")  # a statistic, and the levels of augmentation
    assert not {
        (name, line.strip())
        for name, text in files_in(pets).items()
        for line in text.replace(str(ROOT), "").splitlines()
        if re.search(WORLDS, line, re.I) and not ours.search(line)
    }


def test_its_own_tests_pass(pets: Path) -> None:
    "All but the one that runs the pipeline: that is below, and slow."
    quick = ["-v", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "not pipeline", "tests"]
    told = subprocess.run([BIN / "pytest", *quick], cwd=pets, capture_output=True, text=True)
    assert told.returncode == 0 and " passed" in told.stdout, told.stdout
    told = subprocess.run([BIN / "ruff", "check", "nbs", "tests"], cwd=pets, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    told = subprocess.run([BIN / "ruff", "format", "--check", "nbs", "tests"], cwd=pets, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout


def test_makefile_explains_itself(pets: Path) -> None:
    told = subprocess.run(["make"], cwd=pets, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in told for target in ("setup", "run", "test", "serve", "lab"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["my-pets", "--classes", "cat"], "1 class is nothing to tell apart"),
        (["my-pets"], "needs its classes"),
        (["my-pets", "--classes", "cat,dog,cat"], "the same class twice: cat"),
        (["my-pets", "--classes", "Cat,cat"], "the same class twice"),
        (["my-pets", "--classes", "cat,,dog"], "it's empty"),
        (["my-pets", "--classes", "cat,a/b"], "it holds '/'"),
        (["my-pets", "--classes", "cat,.."], "a dot"),
        (["my-pets", "--classes", "cat,unknown"], "none of the classes"),
        (["my-pets", "--classes", "cat,dog", "--size", "4"], "can't be 4"),
        (["my-pets", "--data", "nowhere"], "is not a folder"),
        (["my-pets", "--data", "."], "no class folder"),
        (["my pets", "--classes", "cat,dog"], "can't be the name of a project"),
        (["json", "--classes", "cat,dog"], "means something else"),
        (["there", "--classes", "cat,dog"], "is there already"),
        (["no/my-pets", "--classes", "cat,dog"], "there is no folder"),
    ],
)
def test_mistakes_leave_nothing(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    told = CliRunner().invoke(app, ["new", *arguments])
    assert told.exit_code == 2 and says in told.output
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_an_interrupted_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import copier

    def half(form: str, folder: Path, **more: object) -> None:
        folder.mkdir()
        (folder / "README.md").write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(copier, "run_copy", half)
    with pytest.raises(OSError, match="no space"):
        new_project(tmp_path / "my-pets", ["cat", "dog"])
    assert not list(tmp_path.iterdir())


def test_classes_are_the_folders(tmp_path: Path) -> None:
    images = shapes(tmp_path / "images", 1)
    assert new_project(tmp_path / "shop", data=images) == ["circle", "square", "triangle"]
    assert load_params(folder=tmp_path / "shop/params").data.folder == str(images)
    assert not (tmp_path / "shop/data").exists()
    told = CliRunner().invoke(app, ["new", str(tmp_path / "other"), "--data", str(images), "--classes", "circle,cat"])
    assert told.exit_code == 2 and "differ: cat, square, triangle" in told.output


def test_own_code_is_found_and_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A network of the project's own, by its place; a change of it makes what depends on it stale."
    images = shapes(tmp_path / "images", 1)
    new_project(tmp_path / "shop", data=images)
    monkeypatch.chdir(tmp_path / "shop")
    monkeypatch.setattr(sys, "path", [*sys.path])
    plan = make_plan(tmp_path / "shop", settings=["model.network=shop.networks.small"])
    assert (
        "shop/networks.py" in plan.inputs["train"]["modules"]
        and "shop/networks.py" not in plan.inputs["check"]["modules"]
    )
    assert "celestial_ml/model/train.py" in plan.inputs["train"]["modules"], (
        "the library is watched where it is installed"
    )


def test_what_the_package_ships_is_the_whole_template() -> None:
    "The patterns in pyproject.toml catch every file of it; and `copier update` finds it from the repository's root."
    workbench = ROOT / "celestial_ml/workbench"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {
        path
        for pattern in patterns["celestial_ml.workbench"]
        for path in glob(pattern, root_dir=workbench, recursive=True)  # noqa: PTH207
    }
    folders = [workbench / "template", workbench / "template/project/nbs/steps"]  # rglob doesn't follow links
    inside = {
        path.relative_to(workbench).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()
    }
    assert {path for path in inside if ".ipynb_checkpoints" not in path} <= shipped
    root = list(yaml.load_all((ROOT / "copier.yml").read_text().replace("!include", ""), yaml.SafeLoader))
    assert (ROOT / root[0]).is_file() and (ROOT / root[1]["_subdirectory"]).is_dir()


@pytest.mark.slow
def test_a_wheel_holds_the_template(tmp_path: Path) -> None:
    "What pip builds has the links' contents, and makes the same project."
    source = snapshot(tmp_path / "source")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", ".", "-w", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = "from celestial_ml.workbench.new_project import new_project; from pathlib import Path; new_project(Path('shop'), ['a', 'b'])"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    (tmp_path / "here").mkdir()
    new_project(tmp_path / "here/shop", ["a", "b"])
    ours, theirs = files_in(tmp_path / "here/shop"), files_in(tmp_path / "shop")
    assert ours.keys() == theirs.keys()
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ <= {".copier-answers.yml", "Makefile", ".github/workflows/ci.yml"}, "only where the library is from"
    assert f"LIBRARY ?= celestial-ml=={wheel.name.split('-')[1]}" in theirs["Makefile"]


def test_the_answers_file_names_the_source_of_updates(pets: Path) -> None:
    answers = yaml.safe_load((pets / ".copier-answers.yml").read_text())
    assert answers["classes"] == ["cat", "golden retriever", "Äffchen"] and answers["package"] == "my_pets"
    assert answers["_src_path"] and re.fullmatch(r"v[0-9.]+.*|[0-9a-f]{7,40}", answers["_commit"])


@pytest.mark.slow
def test_copier_update_brings_what_is_new(tmp_path: Path) -> None:
    "Made by a clone; the clone goes on; the project follows, and keeps what it has changed."
    clone = snapshot(tmp_path / "clone")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com"]
    subprocess.run([*git, "tag", "v0.1.0"], cwd=clone, check=True)
    code = "from celestial_ml.workbench.new_project import new_project; from pathlib import Path; new_project(Path('shop'), ['a', 'b'])"
    env = os.environ | {"PYTHONPATH": str(clone), "GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@example.com"}
    env |= {"GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@example.com"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    shop = tmp_path / "shop"
    (shop / "README.md").write_text("My own words.\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "begin"]):
        subprocess.run(["git", *command], cwd=shop, env=env, check=True)

    step, makefile = (
        clone / "nbs/steps/01_acquire.ipynb",
        clone / "celestial_ml/workbench/template/project/Makefile.jinja",
    )
    step.write_text(step.read_text().replace("# acquire", "# acquire the images"))
    makefile.write_text(makefile.read_text() + "\n# new in this version\n")
    subprocess.run([*git, "commit", "-qam", "better"], cwd=clone, check=True)
    subprocess.run([*git, "tag", "v0.2.0"], cwd=clone, check=True)
    update = [BIN / "copier", "update", "--defaults", "--quiet"]
    told = subprocess.run(update, cwd=shop, env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "# new in this version" in (shop / "Makefile").read_text()
    assert (shop / "nbs/steps/01_acquire.ipynb").read_bytes() == step.read_bytes()
    assert (shop / "README.md").read_text() == "My own words.\n"
    assert "v0.2.0" in (shop / ".copier-answers.yml").read_text()


@pytest.mark.slow
def test_make_test_passes_in_it(pets: Path) -> None:
    "All of its tests, with the pipeline on drawn pictures and the network of its own."
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "PYTEST_"))}
    env |= {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    told = subprocess.run(["make", "test"], cwd=pets, env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout


@pytest.mark.slow
def test_a_new_project_runs_and_answers(tmp_path: Path) -> None:
    "The pipeline at smoke size on shapes, then the service, asked about one of them."
    import httpx
    from serving import running

    images = shapes(tmp_path / "images", 30)
    shop = tmp_path / "shop"
    new_project(shop, data=images)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_"))}
    env |= {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    told = subprocess.run(["make", "run", "PARAMS=smoke"], cwd=shop, env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    about = json.loads((shop / "output/smoke/model.json").read_text())
    assert about["classes"] == ["circle", "square", "triangle"] and about["lineage"]["source"] == "folder"
    card = (shop / "output/smoke/model_card.md").read_text()
    assert not re.search(WORLDS, card, re.I), re.findall(f".*(?:{WORLDS}).*", card, re.I)
    with running(shop / "output/smoke", tmp_path / "log") as url, httpx.Client(base_url=url, timeout=30) as client:
        files = {"image": ("one.png", (images / "circle/1.png").read_bytes(), "image/png")}
        answer = client.post("/predict", files=files).json()
        assert set(answer["probabilities"]) == {"circle", "square", "triangle"}
        page = client.get("/").text
        assert "Circle, square or triangle?" in page and not re.search('Which world|Saturn|"Try to fool it', page)


@pytest.mark.publish
def test_from_the_index_to_a_run_without_a_clone(tmp_path: Path) -> None:
    "`make dist`; a folder in the index's place; an empty environment; `celestial new` in an empty folder; a smoke run there."
    source, python = snapshot(tmp_path / "source"), tmp_path / "env/bin/python"
    outside = {
        name: value for name, value in os.environ.items() if not re.match("CELESTIAL|MLFLOW|PYTHON|PYTEST", name)
    }
    subprocess.run(
        ["make", "READY=", "dist"], cwd=source, env=outside | {"PATH": f"{BIN}:{outside['PATH']}"}, check=True
    )
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    install = (
        ["uv", "pip", "install", "-q", "--python", python]
        if shutil.which("uv")
        else [python, "-m", "pip", "install", "-q"]
    )
    env = outside | {"PATH": f"{python.parent}:/usr/bin:/bin"}

    def typed(*words: object, code: int = 0) -> str:
        done = subprocess.run(list(map(str, words)), cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    subprocess.run([*install, "--find-links", source / "dist", "celestial-ml", "twine"], env=outside, check=True)
    typed(python, "-m", "twine", "check", "--strict", *(source / "dist").iterdir())
    assert "pip install 'celestial-ml[train]'" in typed("celestial", "new", "shop", "--classes", "a,b", code=2)
    subprocess.run([*install, "--find-links", source / "dist", "celestial-ml[train]"], env=outside, check=True)
    typed("celestial", "new", "shop", "--data", shapes(tmp_path / "images", 30))
    typed("make", "-C", "shop", "run", "PARAMS=smoke")
    about = json.loads((tmp_path / "shop/output/smoke/model.json").read_text())
    assert about["classes"] == ["circle", "square", "triangle"]
    assert "circle" in typed("celestial", "predict", "--model", "shop/output/smoke", "--json", "images/circle/1.png")
