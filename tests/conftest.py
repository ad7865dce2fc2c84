"What several test files use: a project of one's own, and the guide's images where they are."

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from projects import Celestial, copy_project, guide_folder
from typer.testing import CliRunner

from celestial_ml.cli.app import app
from celestial_ml.core.testing import mlflow_database
from celestial_ml.flow.pipeline import Plan, make_plan


@pytest.fixture(autouse=True)
def any_width() -> None:
    "Tables without a terminal are as wide as they are, whatever a library or another test has put into the environment."
    os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session")
def guide_images() -> Path:
    "The guide's 1,500 images, from `CELESTIAL_GUIDE_DATA`, `data/raw` or a folder beside the repository; else skip."
    if folder := guide_folder():
        return folder
    pytest.skip("the guide's images are not here: celestial data get guide, or set CELESTIAL_GUIDE_DATA")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A packaged model that looks at the mean colour: small, but real."
    from serving import tiny_model

    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Where a server writes what it says."
    return tmp_path_factory.mktemp("log") / "server.log"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of the project, for the tests of one file."
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def state(project: Path) -> Path:
    "The state folder of the copy, with MLflow's empty database."
    mlflow_database(project / ".celestial/mlflow.db")
    return project / ".celestial"


@pytest.fixture(scope="module")
def celestial(project: Path, state: Path) -> Celestial:
    "Run the command `celestial` in the copy of the project, as a person would, with a state folder of its own."
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_"))}
    env |= {"CELESTIAL_HOME": str(state), "PYTHONPATH": str(project)}

    def run(*arguments: object, cwd: Path = project, **extra: str) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).with_name("celestial")), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=env | extra, capture_output=True, text=True, timeout=900)

    return run


@pytest.fixture(scope="module")
def at_home(project: Path, state: Path) -> Iterator[Path]:
    "This process, at home in the copy of the project."
    before, here = dict(os.environ), Path.cwd()
    os.environ["CELESTIAL_HOME"] = str(state)
    os.environ["CELESTIAL_TERMINAL"] = "1"
    os.chdir(project)
    yield project
    os.chdir(here)
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="module")
def celestial_here(at_home: Path) -> Celestial:
    "The command `celestial` in this process: what a run needs for seconds is imported already."

    def run(*arguments: object) -> subprocess.CompletedProcess:
        for handler in [*logging.root.handlers]:  # a service that ran in this process has left one
            if getattr(getattr(handler, "stream", None), "closed", False):
                logging.root.removeHandler(handler)
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    "A copy of the project in which the smoke pipeline has run: once, whichever process of the tests comes first."
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "smoke-run"
    with FileLock(f"{folder}.lock"):
        if not (folder / "output/smoke/register.json").exists():
            copy_project(folder)
            mlflow_database(folder / ".celestial/mlflow.db")
            command = [str(Path(sys.executable).with_name("celestial")), "run", "smoke", "--json"]
            env = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_"))}
            env |= {"CELESTIAL_HOME": str(folder / ".celestial"), "PYTHONPATH": str(folder)}
            result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            (folder / "run.err").write_text(result.stderr)
    return folder


@pytest.fixture(scope="module")
def smoke(smoke_run: Path, at_home: Path) -> Plan:
    "The pipeline, run once; each file of tests has a copy to change at will."
    for name in ("output", ".celestial"):
        shutil.copytree(smoke_run / name, at_home / name, dirs_exist_ok=True)
    plan = make_plan(at_home, "smoke")
    assert not plan.stale, "a copy of a run is as fresh as the run"
    return plan
