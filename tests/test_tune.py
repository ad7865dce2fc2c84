"Tuning at smoke size: workers on one study, stopped, killed and gone on with, on SQLite and on PostgreSQL."

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import papermill
import psutil
import pytest
from mlflow import MlflowClient
from optuna import load_study
from optuna.storages import fail_stale_trials
from PIL import Image
from programs import postgresql
from serving import until
from sqlalchemy import create_engine, text

from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import read_json
from celestial_ml.core.params import Span, Tune, load_params
from celestial_ml.flow.dag import StepFailed
from celestial_ml.flow.pipeline import Plan, make_plan
from celestial_ml.flow.steps import load_tasks
from celestial_ml.flow.tuning import Search, do_trials, join_study, tune_run
from celestial_ml.model.tune import open_storage, open_study, study_database, suggest, trials_left

SPACE = "{train.lr: {low: 0.001, high: 0.05, log: true}, model.width: [4, 8]}"
QUICK = ["--set", "tune.tune_epochs=2", "--set", "train.augment=none", "--set", f"tune.space={SPACE}"]
ENDLESS = ["--set", "tune.tune_epochs=1000", "--set", "train.augment=none", "--set", f"tune.space={SPACE}"]


@pytest.fixture(scope="module")
def tuned(celestial_here, smoke: Plan) -> dict:
    "A study of three trials by two workers, as the command reports it, in the folder of a finished run."
    result = celestial_here("tune", "smoke", "--trials", 3, "--workers", 2, "--json", *QUICK)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def study(name: str, storage: str | None = None):
    "A study as it is in its database now."
    return load_study(study_name=name, storage=open_storage(study_database(storage)))


def states(name: str, storage: str | None = None) -> list[str]:
    return [trial.state.name for trial in study(name, storage).trials]


def test_two_workers_make_a_study(tuned: dict) -> None:
    trials = study("tune").trials
    assert {trial.state.name for trial in trials} == {"COMPLETE"} and tuned["trials"]["complete"] == len(trials)
    smoke = load_params("smoke")
    assert len(trials) == 3
    own = {"train.lr": smoke.train.lr, "model.width": smoke.model.width}
    assert trials[0].params == own, "the run's own values come first"
    assert len({json.dumps(trial.params) for trial in trials}) == len(trials), "no two alike"
    assert all(set(trial.intermediate_values) == {1, 2} for trial in trials)
    assert tuned["best"]["loss"] == min(trial.value for trial in trials) and tuned["own_loss"] == trials[0].value
    logs = [path.read_text() for path in Path("output/smoke/logs").iterdir()]
    assert len(logs) == 3 and all(log.count("epoch 2 of 2") == 1 for log in logs), "a worker a trial"
    assert not Path(os.environ["CELESTIAL_HOME"], "models").exists(), "no trial is registered"


def test_workers_that_begin_at_once_share_the_first_trials(tmp_path: Path) -> None:
    own, space = {"train.lr": 0.01, "model.width": 8}, {"train.lr": Span(low=0.001, high=0.05), "model.width": [4, 8]}
    for study in map(str, range(5)):
        tune = Tune(study=study, storage=f"sqlite:///{tmp_path}/optuna.db", trials=4, space=space)
        open_study(tune, 7, {}, own)  # as the command does before it starts the workers
        together = Barrier(4)

        def begin(_: int, tune: Tune = tune, together: Barrier = together) -> tuple[int, dict]:
            shared = open_study(tune, 7, {}, own)
            together.wait()
            trial = shared.ask()
            return trial.number, suggest(trial, space)

        with ThreadPoolExecutor(4) as workers:
            begun = dict(workers.map(begin, range(4)))
        assert begun.keys() == {0, 1, 2, 3} and begun[0] == own != begun[1]


def test_pictures_show_something(tuned: dict) -> None:
    plots = Path("output/smoke/plots")
    assert {path.name for path in plots.glob("tune_*.png")} == {
        "tune_history.png",
        "tune_parallel.png",
        "tune_importance.png",
    }
    for path in plots.glob("tune_*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        coloured = pixels.max(-1).astype(int) - pixels.min(-1) > 60  # axes and words are grey
        assert pixels.shape[1] > 400 and 0.0005 < coloured.mean() < 0.5, path
    html = Path("output/smoke/tune.html").read_text()
    assert "course of the search" in html and html.count("data:image/png;base64") >= 3


def test_best_trial_becomes_a_params_file(tuned: dict, at_home: Path) -> None:
    content = Path("params/tuned.yaml").read_text()
    assert len(content.splitlines()) <= 15 and "celestial run tuned" in content
    params, smoke = load_params("tuned"), load_params("smoke")
    best = tuned["best"]["values"]
    assert (params.train.lr, params.model.width) == (best["train.lr"], best["model.width"])
    assert params.data == smoke.data and params.prepare == smoke.prepare and params.train.epochs == smoke.train.epochs
    assert params.train.augment == "none", "what --set said is part of the run"
    plan = make_plan(at_home, "tuned", run="after-tuning")
    assert plan.params == params and list(plan.stale) == list(plan.tasks)


def test_tuning_leaves_the_run_as_fresh_as_it_was(tuned: dict, at_home: Path) -> None:
    assert not make_plan(at_home, "smoke").stale


def test_trials_are_runs_within_the_studys(tuned: dict, at_home: Path) -> None:
    client = MlflowClient(f"sqlite:///{os.environ['CELESTIAL_HOME']}/mlflow.db")
    parent = client.get_run(study("tune").user_attrs["mlflow_runs"][0])
    assert parent.info.status == "FINISHED" and parent.data.metrics["val_cross_entropy"] == tuned["best"]["loss"]
    assert parent.data.tags["optuna.best_trial"] == str(tuned["best"]["trial"])
    assert {f.path for f in client.list_artifacts(parent.info.run_id, "plots")} >= {"plots/tune_history.png"}
    assert parent.data.tags["kind"] == "study" and "on the validation images" in parent.data.tags["mlflow.note.content"]
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    by_id = {run.info.run_id: run for run in nested}
    trials = study("tune").trials
    assert by_id.keys() == {trial.user_attrs["mlflow_run"] for trial in trials}
    for trial in trials:
        run = by_id[trial.user_attrs["mlflow_run"]]
        assert run.info.status == "FINISHED" and run.data.params["width"] == str(trial.params["model.width"])
        history = client.get_metric_history(run.info.run_id, "val_cross_entropy")
        assert [m.value for m in history] == list(trial.intermediate_values.values())


def test_again_is_nothing_to_do_and_more_goes_on(
    tuned: dict, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, settings = len(study("tune").trials), QUICK[1::2]
    again = tune_run(at_home, "smoke", [*settings, f"tune.trials={before}"])
    assert "nothing to do" in capsys.readouterr().out and again == tuned
    more = tune_run(at_home, "smoke", [*settings, f"tune.trials={before + 1}"])
    said = capsys.readouterr().out
    assert f"1 to do, of {before + 1}" in said and f"trial {before}" in said and "best so far" in said
    assert len(study("tune").trials) == before + 1 == more["trials"]["complete"]


@pytest.mark.slow
def test_notebook_on_its_own_does_the_trials_itself(tuned: dict, at_home: Path) -> None:
    space = {"train.lr": [0.01, 0.03], "model.width": [4, 8]}
    told = {"run": "smoke", "study": "alone", "trials": 2, "tune_epochs": 1, "augment": "none", "space": space}
    told |= {"width": 8, "embedding": 16, "batch_size": 16}
    papermill.execute_notebook("nbs/steps/tune.ipynb", str(at_home / "alone.ipynb"), told, progress_bar=False)
    assert states("alone") == ["COMPLETE"] * 2 and read_json("output/smoke/tune.json")["study"] == "alone"
    assert load_params("tuned").train.lr in (0.01, 0.03)


def begun(name: str) -> bool:
    "Whether the first trial of a study is in the middle of it."
    try:
        return bool(study(name).trials[0].intermediate_values)
    except (KeyError, IndexError):
        return False


def start_endless(project: Path, name: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    "A command whose only trial takes for ever, in the middle of it, and all its processes."
    command = [Path(sys.executable).with_name("celestial"), "tune", "smoke", "--trials", "1", *ENDLESS]
    process = subprocess.Popen(
        [*command, "--set", f"tune.study={name}"], cwd=project, env=os.environ | {"PYTHONPATH": str(project)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: begun(name) or process.poll() is not None, 300, 0.3)
    assert process.poll() is None, process.communicate()
    return process, psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    "Whether all of them have ended."
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


def test_a_stopped_command_stops_its_workers(tuned: dict, project: Path) -> None:
    process, children = start_endless(project, "stopped")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "finished work is kept" in err and "Traceback" not in out + err
    until(lambda: gone(children), 30, 0.1)
    assert states("stopped") == ["FAIL"]


@pytest.mark.slow
def test_workers_of_a_killed_command_stop_and_its_trial_blocks_nobody(tuned: dict, project: Path) -> None:
    process, children = start_endless(project, "left-alone")
    process.kill()
    until(lambda: gone(children), 30, 0.1)
    assert states("left-alone") == ["RUNNING"]
    silent = "UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')"  # rather than wait for it
    with create_engine(study_database(None).url).begin() as connection:
        connection.execute(text(silent))
    fail_stale_trials(study("left-alone"))  # as whoever joins does
    assert states("left-alone") == ["FAIL"]


def test_a_killed_workers_trial_blocks_nobody(tuned: dict, at_home: Path) -> None:
    p = load_params("smoke", [*ENDLESS[1::2], "tune.study=killed", "tune.trials=1"])
    search = Search("smoke", p.seed, p.model, p.train, p.tune, p.track)
    reads = {name: task.product for name, task in load_tasks(at_home, "smoke").items()}
    shared = join_study(search, reads)
    with ThreadPoolExecutor() as pool:
        working = pool.submit(do_trials, search, reads, shared, quiet=True)
        until(lambda: begun("killed") or working.done(), 300, 0.3)
        [worker] = [p for p in psutil.Process().children(recursive=True) if p.ppid() != os.getpid()]
        worker.kill()
        with pytest.raises(StepFailed, match="1 trials are missing; a worker stopped: killed by signal 9"):
            working.result(60)
    assert states("killed") == ["FAIL"] and trials_left(shared, 1) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["tune.space={train.lrr: [0.1]}"], "did you mean train.lr?"),
        (["tune.space={train.lr: {low: 0.1, high: 7}}"], "train.lr can't be 7"),
        (["tune.space={model.network: [compct]}"], "did you mean 'compact'?"),
        (["tune.space={}"], "tune.space is empty"),
        (["tune.trials=0"], "tune.trials can't be 0"),
        (["tune.storage=mysql://anna:secret@db/x"], "can't be in mysql:"),
        (["tune.storage=postgresql://anna:secret@127.0.0.1:1/x"], "can't be used: connection failed"),
        (["tune.storage=sqlite:////nowhere/at/all.db"], "can't be used: unable to open database file"),
        (["tune.tune_epochs=3"], "tune.tune_epochs was 2, is 3"),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else "",
)
def test_a_mistake_is_reported_before_any_trial(tuned: dict, at_home: Path, settings: list[str], words: str) -> None:
    before = dict(os.environ), len(study("tune").trials)
    usual = ["tune.tune_epochs=2", "train.augment=none", f"tune.space={SPACE}", "tune.trials=99"]
    with pytest.raises(CelestialError) as error:
        tune_run(at_home, "smoke", usual + settings, quiet=True)
    assert words in error.value.message and "secret" not in str(error.value)
    assert len(study("tune").trials) == before[1]
    os.environ.clear()
    os.environ |= before[0]


def test_a_mistake_is_an_error_without_a_traceback(celestial) -> None:
    result = celestial("tune", "smoke", "--set", "tune.storage=postgresql://anna:secret@127.0.0.1:1/x")
    assert result.returncode == 2 and "connection failed" in result.stderr
    assert "Traceback" not in result.stderr and "secret" not in result.stderr + result.stdout


@pytest.fixture
def postgres() -> Iterator[str]:
    "The URL of a database on a PostgreSQL server that lives as long as the test."
    with postgresql() as server:
        yield server.url()


@pytest.mark.slow
@pytest.mark.postgres
def test_two_machines_share_a_study_on_postgresql(
    tuned: dict, postgres: str, celestial, at_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Two commands with a state folder each, as on two machines: one study, done by both."

    def command(machine: int) -> subprocess.CompletedProcess:
        where = ["--run", f"machine-{machine}", "--set", f"tune.storage={postgres}", "--json"]
        home = str(tmp_path / f"home-{machine}")
        return celestial("tune", "smoke", "--trials", 4, *where, *QUICK, CELESTIAL_HOME=home)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(command, (1, 2)))
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    told = [json.loads(result.stdout) for result in results]
    trials = study("tune", postgres).trials
    assert len(trials) in (4, 5) and {trial.state.name for trial in trials} == {"COMPLETE"}
    assert told[0]["best"] == told[1]["best"] and told[0]["best"]["loss"] == min(trial.value for trial in trials)
    did = [set(client_runs(tmp_path / f"home-{machine}")) for machine in (1, 2)]
    assert did[0] and did[1] and not did[0] & did[1], "each did its part, and tracked it at home"
    assert did[0] | did[1] == {trial.number for trial in trials}
    written = [p for run in ("machine-1", "machine-2") for p in (at_home / "output" / run).rglob("*") if p.is_file()]
    assert len(written) > 20
    for path in [*written, at_home / "params/tuned.yaml"]:
        assert b"s3cret" not in path.read_bytes(), path
    assert "s3cret" not in "".join(result.stdout + result.stderr for result in results)


def client_runs(home: Path) -> list[int]:
    "The trials that were tracked in a state folder."
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return [int(run.data.tags["optuna.trial"]) for run in runs if "optuna.trial" in run.data.tags]
