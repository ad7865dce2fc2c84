"The same step notebooks under Ploomber, under papermill alone and opened by hand: the same products."

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest

from celestial_ml.core.files import read_json
from celestial_ml.core.params import load_params
from celestial_ml.flow.pipeline import Plan
from celestial_ml.flow.steps import load_tasks, step_parameters


def as_edited(notebook: Path, values: dict[str, object]) -> None:
    "Change the parameters cell, as a person in JupyterLab does."
    content = json.loads(notebook.read_text())
    cell = next(c for c in content["cells"] if "parameters" in c["metadata"].get("tags", []))
    lines = "".join(cell["source"]).splitlines()
    edited = [
        f"{m[1]} = {values[m[1]]!r}" if (m := re.match(r"(\w+) = ", line)) and m[1] in values else line
        for line in lines
    ]
    cell["source"] = "\n".join(edited)
    notebook.write_text(json.dumps(content))


def same_preparation(one: Path, other: Path) -> None:
    "What two runs made of the same images is the same."
    assert (np.load(one / "pixels.npy") == np.load(other / "pixels.npy")).all()
    checks = [(folder / "checks.json").read_text().replace(f"output/{folder.name}/", "") for folder in (one, other)]
    assert json.loads(checks[0]) == json.loads(checks[1])
    tables = [pd.read_parquet(folder / "features.parquet").drop(columns="path") for folder in (one, other)]
    pd.testing.assert_frame_equal(*tables)


def same_products(one: Path, other: Path) -> None:
    "What two runs made of the same parameters is the same."
    same_preparation(one, other)
    assert (one / "history.csv").read_text() == (other / "history.csv").read_text(), "training is reproducible"
    metrics = [read_json(folder / "metrics.json") for folder in (one, other)]
    for image in (image for found in metrics for image in found["suspected_labels"]):
        del image["path"]  # it names the run's folder
    assert metrics[0] == metrics[1]
    tables = [pd.read_parquet(folder / "predictions.parquet").drop(columns="path") for folder in (one, other)]
    pd.testing.assert_frame_equal(*tables)
    logits = [np.stack(pd.read_parquet(f / "predictions.parquet").logits.tolist()) for f in (one, other)]
    assert (logits[0] == logits[1]).all()
    scores = [[row["share_on_body"] for row in read_json(f / "explain.json")] for f in (one, other)]
    assert scores[0] == pytest.approx(scores[1])
    thresholds = [read_json(f / "model.json")["ood_threshold"] for f in (one, other)]
    assert thresholds[0] == pytest.approx(thresholds[1])


@pytest.mark.parametrize(
    ("until", "same"), [("prepare", same_preparation), pytest.param("register", same_products, marks=pytest.mark.slow)]
)
def test_papermill_alone_makes_the_same(
    smoke: Plan, at_home: Path, until: str, same: Callable[[Path, Path], None]
) -> None:
    parameters = load_params("smoke")
    for name, task in load_tasks(at_home, "smoke", until).items():
        told = step_parameters(name, parameters) | {"run": "by-papermill"}
        known = papermill.inspect_notebook(str(task.source))
        assert told.keys() <= known.keys()
        out = at_home / f"{name}-papermill.ipynb"
        papermill.execute_notebook(str(task.source), str(out), told, progress_bar=False)
    same(Path("output/smoke"), Path("output/by-papermill"))


@pytest.mark.slow
def test_each_step_opened_on_its_own_makes_the_same(smoke: Plan, at_home: Path) -> None:
    "As in JupyterLab: a kernel that starts in the notebook's own folder, the parameters cell edited by hand."
    steps = at_home / "nbs/steps"
    parameters = load_params("smoke")
    for name, task in smoke.tasks.items():
        notebook = steps / f"opened-{name}.ipynb"
        shutil.copy2(task.source, notebook)
        as_edited(notebook, step_parameters(name, parameters) | {"run": "by-hand"})
        command = [Path(sys.executable).parent / "jupyter", "execute", notebook.name]
        result = subprocess.run(command, cwd=steps, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        notebook.unlink()
    same_products(Path("output/smoke"), Path("output/by-hand"))
