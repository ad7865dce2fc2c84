"Continuous training: one at a time, killed anywhere, refused, retried; and the champion is never worse off."

import os
import random
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from packages import package
from serving import until

from celestial_ml.core.files import read_json, take_lock, write_json
from celestial_ml.core.params import default_yaml
from celestial_ml.core.testing import mlflow_database
from celestial_ml.flow.dag import ENGINE_MODULES
from celestial_ml.flow.retraining import last_training, read_record, retrain
from celestial_ml.flow.steps import load_tasks
from celestial_ml.monitor.log import open_log
from celestial_ml.monitor.snapshot import Snapshot, monitor_folder, read_snapshot, write_snapshot
from celestial_ml.package.manifest import damage
from celestial_ml.package.published import published
from celestial_ml.registry.audit import append, verify
from celestial_ml.registry.state import champion, recover
from celestial_ml.registry.versions import publish


def write_project(folder: Path, steps: dict[str, str], product: str = "") -> None:
    "A project whose steps run these cells, one after the other; `product` names what the last one writes."
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    tasks, before = [], ""
    for name, code in steps.items():
        parts = [("upstream = product = resources_ = None\nrun = ''", ["parameters"]), (code, [])]
        cells = [
            {"cell_type": "code", "outputs": [], "execution_count": None, "id": f"c{i}", "source": source}
            | {"metadata": {"tags": tags}}
            for i, (source, tags) in enumerate(parts)
        ]
        write_json(
            folder / f"nbs/{name}.ipynb", {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        )
        more = product if name == [*steps][-1] else ""
        makes = f"{{notebook: '{{{{out}}}}/{name}.ipynb'{more}}}"
        tasks.append(
            f"- {{name: {name}, source: nbs/{name}.ipynb, product: {makes}, nb_product_key: notebook{before}}}"
        )
        before = f", upstream: [{name}]"
    (folder / "pipeline.yaml").write_text("\n".join(["tasks:", *tasks]))
    (folder / "params").mkdir(exist_ok=True)
    (folder / "params/default.yaml").write_text(default_yaml())


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "The folder of a project to be written."
    (tmp_path / "project").mkdir()
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path / ".celestial"))
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def lock_is_free() -> bool:
    "Whether nobody trains."
    lock = take_lock(Path(os.environ["CELESTIAL_HOME"]) / "retrain.lock")
    if lock is not None:
        lock.release()
    return lock is not None


def test_a_training_that_was_killed_is_gone_on_with(small: Path) -> None:
    code = """
import json, os, pathlib
if not pathlib.Path('killed').exists():
    pathlib.Path('killed').touch()
    os.kill(os.getpid(), 9)
json.dump({'decision': 'promote', 'model': 'celestial/1', 'reasons': ['so']}, open(product['verdict'], 'w'))
"""
    write_project(small, {"check": code}, ", verdict: '{{out}}/register.json'")
    code = (
        "from pathlib import Path; from celestial_ml.flow.retraining import retrain; retrain(Path.cwd(), request='now')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line["event"] for line in read_record()] == ["began"] and lock_is_free()
    again = retrain(small, quiet=True)  # nobody asks, and no trigger has a reason
    assert again["ran"] and again["outcome"] == "promote" and again["run"] == read_record()[0]["run"]
    assert not retrain(small, quiet=True)["ran"]


def test_watch_ends_with_sigterm_and_once_with_the_code_of_the_training(small: Path) -> None:
    write_project(small, {"check": "pass"})
    command = [str(Path(sys.executable).with_name("celestial")), "watch"]
    watch = subprocess.Popen([*command, "--every", "600"], stdout=subprocess.PIPE, text=True)
    assert watch.stdout and "celestial monitor check" in watch.stdout.readline()
    watch.send_signal(signal.SIGTERM)
    assert watch.wait(120) == 0
    wrong = subprocess.run([*command, "--once", "--set", "train.lr=no"], capture_output=True, text=True)
    assert wrong.returncode == 2, wrong.stderr


def test_triggers_trust_no_old_look(small: Path) -> None:
    "An alarm of an hour ago is a reason no more, where a look of now raises none."
    write_project(small, {"check": "pass"})
    publish(package(small.parent / "package", 0.95), "tiny/1")
    append("promote", "tiny/1", "champion", {})
    recover()
    open_log().close()
    alarm = {"group": "unknown", "column": "unknown", "image": 9, "since_time": 0, "severity": "harm", "what": "dark"}
    about = {"model": "tiny/1", "begin": 0, "end": 0, "answers": 9, "metrics": {}, "alarms": [alarm], "reasons": []}
    write_snapshot(Snapshot(time=time.time() - 60, **about))
    assert retrain(small, quiet=True)["reasons"] == ["drift: dark"]
    write_snapshot(Snapshot(time=time.time() - 3600, **about))
    assert retrain(small, quiet=True)["reasons"] == []
    seen = read_snapshot()
    assert seen and time.time() - seen.time < 60 and not seen.alarms
    write_snapshot(Snapshot(time=time.time() - 3600, **about))
    (monitor_folder() / "alerts.json").write_text('{"rules": 3}')
    done = retrain(small, quiet=True)
    assert done["reasons"] == [] and "alerts.json" in " ".join(done["unseen"]), "a look that failed is not silent"


def test_old_trainings_are_removed_but_not_those_of_the_champions(small: Path) -> None:
    code = "import json; json.dump({'decision': 'promote', 'model': 'x', 'reasons': ['so']}, open(product['verdict'], 'w'))"
    write_project(small, {"check": code}, ", verdict: '{{out}}/register.json'")
    for number, run in enumerate(["retrain/20260101T000000", "retrain/20260102T000000"], 1):
        folder = package(small.parent / f"package{number}", 0.95)
        about = read_json(folder / "model.json")
        write_json(folder / "model.json", about | {"lineage": about["lineage"] | {"run": run}})
        publish(folder, f"tiny/{number}")
        append("promote", f"tiny/{number}", "champion", {})
    for day in range(1, 7):
        (small / f"output/retrain/2026010{day}T000000").mkdir(parents=True)
    (small / "output/retrain/notes").mkdir()
    done = retrain(small, settings=["retrain.keep=2"], request="now", quiet=True)
    left = {path.name for path in (small / "output/retrain").iterdir()}
    newest = {f"2026010{day}T000000" for day in (1, 2, 6)} | {done["run"].removeprefix("retrain/")}
    assert left == newest | {"notes"}


# The registry, the gate and the runner are real; only the learning is not.
HEAD = """
import os, pathlib, shutil, time
from celestial_ml.core.files import write_json
from celestial_ml.core.params import Register, Track
from celestial_ml.registry.decisions import register_version, submit
from celestial_ml.registry.tracking import start_run
folder, n = pathlib.Path(product['notebook']).parent, int(pathlib.Path('n').read_text())
pathlib.Path('at').write_text(NAME)
"""
STEPS = {
    "acquire": "time.sleep(0.2)",
    "train": "time.sleep(0.2)",
    "package": "shutil.copytree(f'../packages/{n}', folder / 'package', dirs_exist_ok=True)",
    "register": """
with start_run(Track(), "a run") as tracked:
    model = register_version(folder / "package", "tiny", tracked, "test")
verdict = submit(model, Register(not_worse_by=0.9, max_doubt=1.0, min_paired=1, must_beat=[]), "test")
write_json(product['verdict'], verdict.to_dict())""",
}
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT if hasattr(os, "WNOWAIT") else 0


def in_a_fork(project: Path, kill_at: str | None = None, seconds: float = 0.0) -> int:
    "The exit status of a retraining in a process of its own, which is killed some time after this step began."
    (project / "at").write_text("nothing")
    if not (pid := os.fork()):
        try:
            retrain(project, request="a test", quiet=True)
            os._exit(0)
        finally:
            os._exit(1)
    if kill_at is not None:
        until(lambda: (project / "at").read_text() == kill_at or os.waitid(os.P_PID, pid, ENDED), 300, 0.005)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_twenty_kills_leave_a_champion_and_no_lock(small: Path) -> None:
    "After each the champion is whole, the lock is free, and the next training completes."
    for module in ("mlflow", *ENGINE_MODULES):  # before the forks, each of which would take seconds for them
        import_module(module)
    write_project(
        small,
        {name: HEAD.replace("NAME", repr(name)) + code for name, code in STEPS.items()},
        ", verdict: '{{out}}/register.json'",
    )
    mlflow_database(small.parent / ".celestial/mlflow.db")
    rng, killed = random.Random(7), 0
    for moment in range(20):
        package(small.parent / f"packages/{moment}", 0.95 - 0.005 * (moment % 7), name=f"v{moment}")
        (small / "n").write_text(str(moment))
        kill_at, serving = ["nothing", *STEPS][moment % 5], champion()
        status = in_a_fork(small, kill_at, rng.uniform(0, 2 if kill_at == "register" else 0.3))
        killed += status == signal.SIGKILL
        recover()
        assert verify().problems == [] and lock_is_free()
        now = champion()
        assert now is not None or serving is None
        assert now is None or not damage(published(now.model))
        assert in_a_fork(small) == 0
        assert read_record()[-1]["event"] == "ended" and last_training(read_record())[1] is None
        now = champion()
        assert now is not None and not damage(published(now.model))
        outcome = read_record()[-1]["outcome"]
        print(f"{moment}: killed at {kill_at} ({status}); then {outcome}, champion {now.model}", flush=True)
    assert killed >= 15, "most were killed before they ended"


REAL = ["model.width=4", "prepare.size=16", "evaluate.ood_images=4", "evaluate.bootstrap=100", "check.backbone=false"]
REAL += ["register.publish=true", "register.not_worse_by=0.9", "register.max_doubt=1.0", "register.min_paired=1"]
REAL += [f"register.{name}=0" for name in ("min_accuracy", "min_macro_f1", "min_class_f1", "min_slice")]
REAL += [f"register.{name}=1" for name in ("max_slice_gap", "max_ece", "max_false_alarms")] + ["register.must_beat=[]"]


@pytest.mark.slow
def test_twenty_kills_of_the_real_steps(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "In each of the pipeline's steps at smoke size: the champion is whole, the lock is free, and the next command completes."
    monkeypatch.setenv("CELESTIAL_HOME", str(project / ".celestial"))
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.chdir(project)
    mlflow_database(project / ".celestial/mlflow.db")
    steps, rng, killed = [*load_tasks(project, "default")], random.Random(7), 0

    def begin(moment: int) -> "subprocess.Popen[bytes]":
        command = [str(Path(sys.executable).with_name("celestial")), "retrain", "smoke", "--reason", "a test"]
        settings = [word for one in (*REAL, f"train.lr={0.003 + moment / 1e4}") for word in ("--set", one)]
        return subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    for moment in range(20):
        step, lines, serving = moment % len(steps), len(read_record()), champion()
        training = begin(moment)
        until(lambda: len(read_record()) > lines or training.poll() is not None, 600)  # noqa: B023
        before = project / "output" / read_record()[-1]["run"] / f"{steps[step - 1]}.ipynb"
        until(lambda: not step or before.exists() or training.poll() is not None, 900, 0.02)  # noqa: B023
        time.sleep(rng.uniform(0, 2))
        training.kill()
        training.communicate()
        killed += training.returncode == -signal.SIGKILL
        recover()
        assert verify().problems == [] and lock_is_free()
        now = champion()
        assert (now is not None or serving is None) and (now is None or not damage(published(now.model)))
        again = begin(moment)
        assert again.wait(1800) == 0, again.communicate()[1].decode()
        assert read_record()[-1]["event"] == "ended" and last_training(read_record())[1] is None
        now = champion()
        assert now is not None and not damage(published(now.model))
        what = f"{steps[step]} ({training.returncode}); then {read_record()[-1]['outcome']}, champion {now.model}"
        print(f"{moment}: killed in {what}", flush=True)
    assert killed >= 15, "most were killed before they ended"
