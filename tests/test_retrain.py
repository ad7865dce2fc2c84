"Continuous training: one at a time, killed anywhere, refused, retried; and the champion is never worse off."

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from projects import copy_project

from celestial_ml.core.files import take_lock, write_json
from celestial_ml.core.params import default_yaml
from celestial_ml.core.testing import mlflow_database
from celestial_ml.flow.retraining import last_training, read_record, retrain
from celestial_ml.package.manifest import damage
from celestial_ml.package.published import published
from celestial_ml.registry.audit import verify
from celestial_ml.registry.state import champion, recover


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A project of one step, which kills its process the first time."
    code = """
import json, os, pathlib
if not pathlib.Path('killed').exists():
    pathlib.Path('killed').touch()
    os.kill(os.getpid(), 9)
json.dump({'decision': 'promote', 'model': 'celestial/1', 'reasons': ['so']}, open(product['verdict'], 'w'))
"""
    cells = [
        {"cell_type": "code", "outputs": [], "execution_count": None, "id": f"c{i}", "source": source}
        | {"metadata": {"tags": tags}}
        for i, (source, tags) in enumerate(
            [("upstream = product = resources_ = None\nrun = ''", ["parameters"]), (code, [])]
        )
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (tmp_path / "params").mkdir()
    (tmp_path / "params/default.yaml").write_text(default_yaml())
    write_json(tmp_path / "nbs/check.ipynb", {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    product = "{notebook: '{{out}}/check.ipynb', verdict: '{{out}}/register.json'}"
    tasks = f"tasks: [{{name: check, source: nbs/check.ipynb, product: {product}, nb_product_key: notebook}}]"
    (tmp_path / "pipeline.yaml").write_text(tasks)
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path / ".celestial"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_training_that_was_killed_is_gone_on_with(small: Path) -> None:
    code = (
        "from pathlib import Path; from celestial_ml.flow.retraining import retrain; retrain(Path.cwd(), request='now')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line["event"] for line in read_record()] == ["began"]
    lock = take_lock(small / ".celestial/retrain.lock")
    assert lock is not None, "the lock of a process that is dead is free"
    lock.release()
    again = retrain(small, quiet=True)  # nobody asks, and no trigger has a reason
    assert again["ran"] and again["outcome"] == "promote" and again["run"] == read_record()[0]["run"]
    assert not retrain(small, quiet=True)["ran"]


LAX = ["min_accuracy", "min_macro_f1", "min_class_f1", "min_slice"]
SMOKE = ["register.publish=true", "register.max_slice_gap=1.0", "register.max_ece=1.0", "register.max_false_alarms=1.0"]
SMOKE += ["register.must_beat=[]", *(f"register.{name}=0.0" for name in LAX)]
STEPS = ("acquire", "check", "prepare", "train", "evaluate", "explain", "package", "register")


def retraining(project: Path, seed: int) -> subprocess.Popen[str]:
    "The command, in a process group of its own."
    words = [word for setting in [*SMOKE, f"seed={seed}"] for word in ("--set", setting)]
    command = [str(Path(sys.executable).with_name("celestial")), "retrain", "smoke", "--reason", "a test", *words]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_"))}
    env |= {"CELESTIAL_HOME": str(project / ".celestial"), "PYTHONPATH": str(project), "CELESTIAL_TERMINAL": "1"}
    return subprocess.Popen(
        command,
        cwd=project,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_after(process: subprocess.Popen[str], step: int, seconds: float) -> bool:
    "Kill it and all its children some time after so many steps; whether it was still running."
    assert process.stdout
    done = 0
    while done < step and (line := process.stdout.readline()):
        done += "✓" in line
    time.sleep(seconds)
    alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL) if alive else None
    process.wait()
    return alive


@pytest.mark.slow
def test_twenty_kills_leave_a_champion_and_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "After each the champion is whole, the lock is free, and the next one completes."
    project, rng, killed = copy_project(tmp_path / "project"), random.Random(7), 0
    mlflow_database(project / ".celestial/mlflow.db")
    monkeypatch.setenv("CELESTIAL_HOME", str(project / ".celestial"))
    monkeypatch.chdir(project)
    for moment in range(int(os.environ.get("CELESTIAL_KILLS", "20"))):
        before = champion()
        killed += kill_after(retraining(project, moment), moment % len(STEPS), rng.uniform(0.1, 3.0))
        recover()
        now = champion()
        assert now is None or not damage(published(now.model))
        assert before is None or now is not None
        assert verify().problems == []
        lock = take_lock(project / ".celestial/retrain.lock")
        assert lock is not None
        lock.release()
        following = retraining(project, moment)
        output = following.communicate(timeout=900)[0]
        assert following.returncode == 0, output
        assert read_record()[-1]["event"] == "ended" and last_training(read_record())[1] is None
        now = champion()
        assert now is not None and not damage(published(now.model))
        print(
            f"{moment}: killed after {moment % len(STEPS)} steps; {read_record()[-1]['outcome']}, champion {now.model}"
        )
    assert killed >= 15, "most were killed before they ended"
