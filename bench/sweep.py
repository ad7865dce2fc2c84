"""`celestial sweep` against plain papermill, one notebook after the other: the same runs on the same cores."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import papermill
import yaml

from bench import CELESTIAL, Row
from celestial_ml.core.files import project_root
from celestial_ml.core.params import load_params
from celestial_ml.flow.steps import load_tasks, step_parameters
from celestial_ml.flow.workers import Owner, Workers, slow_modules

PAPERMILL = str(Path(sys.executable).with_name("papermill"))


def copy_project(root: Path, folder: Path) -> None:
    "What running needs, so that nothing is left in the project."
    for name in ("params", "nbs/steps", "celestial_ml"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*root.glob("pipeline*.yaml"), *root.glob("data/*.dvc")):
        (folder / path.relative_to(root)).parent.mkdir(exist_ok=True)
        shutil.copy2(path, folder / path.relative_to(root))


def step_runs(folder: Path, way: str, until: str, seeds: range) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    "Each run's steps in order: a notebook, where it goes when it's executed, and its parameters."
    for seed in seeds:
        run, params = f"{way}/seed-{seed}", load_params("smoke", [f"seed={seed}"], folder / "params")
        for task in load_tasks(folder, run, until).values():
            executed = folder / task.product["notebook"]
            executed.parent.mkdir(parents=True, exist_ok=True)
            yield str(task.source), executed, step_parameters(task.name, params) | {"run": run}


def plain(folder: Path, until: str, seeds: range, env: dict[str, str]) -> float:
    "Seconds of papermill's own command, run after run and step after step, each told its parameters by a file."
    began = time.perf_counter()
    for source, executed, values in step_runs(folder, "plain", until, seeds):
        parameters = executed.with_suffix(".yaml")
        parameters.write_text(yaml.safe_dump(values))
        command = [PAPERMILL, source, executed, "-f", parameters, "--no-progress-bar"]
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    return time.perf_counter() - began


ENGINE = """
import json, sys
from ploomber_engine import execute_notebook
for source, executed, parameters in json.load(sys.stdin):
    execute_notebook(source, executed, parameters=parameters, progress_bar=False)
"""


def by_engine(folder: Path, until: str, seeds: range, env: dict[str, str]) -> float:
    "Seconds of ploomber-engine, notebook after notebook in one process, so that what is imported stays; none is isolated."
    runs = step_runs(folder, "engine", until, seeds)
    tasks = [[source, str(executed), values] for source, executed, values in runs]
    began, told = time.perf_counter(), json.dumps(tasks)
    command = [sys.executable, "-c", ENGINE]
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, input=told, text=True)
    return time.perf_counter() - began


def swept(folder: Path, until: str, seeds: range, env: dict[str, str]) -> float:
    "Seconds of `celestial sweep`, from the shell to its page, imports included."
    grid = f"seed={','.join(map(str, seeds))}"
    command = [CELESTIAL, "sweep", "smoke", "--grid", grid, "--until", until, "--run", "swept", "--json"]
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    return time.perf_counter() - began


ISOLATED = "A sweep runs each step in a process of its own, so that no run can change another; one process has nothing to start."


def side_by_side(until: str, runs: int) -> list[Row]:
    "So many runs of the pipeline up to a step, both ways; they must make the same."
    seeds = range(1, runs + 1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copy_project(project_root(), folder)
        env = os.environ | {"PYTHONPATH": made, "CELESTIAL_HOME": f"{made}/.celestial", "TF_CPP_MIN_LOG_LEVEL": "3"}
        steps = list(load_tasks(folder, "any", until))
        own, engine = swept(folder, until, seeds, env), by_engine(folder, until, seeds, env)
        other = plain(folder, until, seeds, env)
        for seed in seeds if until == "prepare" else ():
            pixels = [np.load(folder / f"output/{way}/seed-{seed}/pixels.npy") for way in ("swept", "plain", "engine")]
            if not all(np.array_equal(pixels[0], one) for one in pixels):
                sys.exit(f"the run with seed {seed} made something else")
    what = f"{runs} runs of {' → '.join(steps)}"
    in_one = {"ploomber-engine in one process": [engine]}
    return [
        Row(what, "s", [own], {"papermill in sequence": [other]}, goal=3.0),
        Row(f"{what}, not isolated", "s", [own], in_one, goal=1.0, why=ISOLATED),
    ]


def execute(_: Owner, source: str, executed: str) -> None:
    "Be a worker: execute a notebook."
    from ploomber_engine import execute_notebook

    execute_notebook(source, executed, progress_bar=False)


def start_up(times: int = 3) -> Row:
    "A notebook that imports what training needs, in a process of its own: from the call to its end."
    code = "import tensorflow, keras, pandas, mlflow, matplotlib.pyplot"
    took: dict[str, list[float]] = {"worker": [], "kernel": []}
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "imports.ipynb"
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=kernel), path)
        executed = path.with_name("out.ipynb")
        with Workers(1, [*slow_modules([path]), "IPython", "ploomber_engine"]) as workers:
            for _ in range(times + 1):  # the first one waits for the server's imports
                began = time.perf_counter()
                workers.start("worker", execute, str(path), str(executed), log=path.with_name("log"))
                while workers.running:
                    workers.events()
                took["worker"].append(time.perf_counter() - began)
            for _ in range(times):
                began = time.perf_counter()
                papermill.execute_notebook(path, executed, progress_bar=False)
                took["kernel"].append(time.perf_counter() - began)
    what = "a notebook that imports TensorFlow, MLflow and pandas"
    return Row(what, "s", took["worker"][1:], {"a kernel of its own, by papermill": took["kernel"]}, goal=3.0)


def sweep_rows(quick: bool) -> list[Row]:
    "The figures of sweeps."
    return [start_up(1 if quick else 3), *side_by_side("acquire" if quick else "prepare", 3 if quick else 20)]
