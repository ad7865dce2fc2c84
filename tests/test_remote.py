"""Everything on servers, by environment variables alone: MLflow, PostgreSQL, a store that speaks S3, a webhook.

The servers are real and on loopback: `pytest -m remote` runs them.
"""

import hashlib
import hmac
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest
from programs import PostgreSQL, forget_connections, free_port, postgresql, s3_store, wait_for, web_server
from projects import copy_project
from serving import encoded
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

from celestial_ml.batch.job import batch, output
from celestial_ml.batch.scoring import Engine, threads
from celestial_ml.cli.app import app
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import read_json, sha256_of
from celestial_ml.core.params import Alerts, Params, Track
from celestial_ml.core.testing import TemporaryHome
from celestial_ml.monitor.sinks import notify, read_alerts
from celestial_ml.monitor.snapshot import Snapshot
from celestial_ml.planets.renderer import render
from celestial_ml.registry.tracking import mlflow_client
from celestial_ml.serve.predictor import Predictor

HOOK_PATH = f"/hooks/{secrets.token_hex(8)}"  # as chat programs have it: the address is the secret
WEBHOOK_SECRET = f"whsec-{secrets.token_hex(8)}"


@contextmanager
def mlflow_server(folder: Path, env: dict[str, str]) -> Iterator[str]:
    "MLflow's server; where its store is, it has from the environment, too."
    if find_spec("boto3") is None:  # which MLflow needs for S3, and nothing else does
        wanted = [f"boto3=={version('botocore')}", "s3transfer"]
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *wanted]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("boto3 can't be installed")
        env = env | {"PYTHONPATH": f"{folder}:{env.get('PYTHONPATH', '')}"}
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    off = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "mlflow.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=env | off, stdout=log, stderr=log)
    try:
        wait_for(port, 120)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@dataclass
class Remote:
    "The servers, and a project that has nothing else."

    project: Path
    home: Path
    store: Path  # the folder that the S3 server serves
    database: PostgreSQL
    env: dict[str, str]
    alerts: list[dict[str, Any]] = field(default_factory=list)  # that the webhook took
    written: str = ""  # all that was printed

    def __call__(self, *arguments: object, code: int = 0, **extra: str) -> str:
        "What the command prints; it must end with a code."
        command = [str(Path(sys.executable).with_name("celestial")), *map(str, arguments)]
        done = subprocess.run(command, cwd=self.project, env=self.env | extra, capture_output=True, text=True)
        self.written += done.stdout + done.stderr
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout if code == 0 else done.stdout + done.stderr

    def rows(self, table: str) -> int:
        "Rows of a table in PostgreSQL."
        engine = create_engine(self.database.url().replace("postgresql:", "postgresql+psycopg:"))
        with engine.connect() as connection:
            return connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder, alerts = tmp_path_factory.mktemp("remote"), list[dict[str, Any]]()

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fields = dict(part.split("=") for part in self.headers["Celestial-Signature"].split(","))
            right = hmac.new(WEBHOOK_SECRET.encode(), fields["t"].encode() + b"." + body, hashlib.sha256).hexdigest()
            taken = self.path == HOOK_PATH and hmac.compare_digest(right, fields["v1"])
            alerts.extend([json.loads(body)] if taken else [])
            self.send_response(200 if taken else 403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_", "AWS_"))}
    with ExitStack() as stack:
        database = stack.enter_context(postgresql())
        buckets = ("artifacts", "images", "scores", "data")
        _, keys = stack.enter_context(s3_store(folder / "s3", *buckets))
        hook = stack.enter_context(web_server(Hook))
        engine = create_engine(
            database.url().replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(text("CREATE DATABASE mlflow"))
        runs = database.url("mlflow").replace("postgresql:", "postgresql+psycopg:")
        there = {"MLFLOW_BACKEND_STORE_URI": runs, "MLFLOW_ARTIFACTS_DESTINATION": "s3://artifacts/mlflow"}
        (folder / "mlflow").mkdir()
        tracking = stack.enter_context(mlflow_server(folder / "mlflow", kept | keys | there))
        project = copy_project(folder / "project")
        for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q", "-f"]):
            subprocess.run(command, cwd=project, check=True)
        env = kept | keys | {
            "CELESTIAL_HOME": str(folder / "state"),
            "PYTHONPATH": str(project),
            "MLFLOW_TRACKING_URI": tracking,
            "CELESTIAL_DATABASE_URL": database.url(),
            "CELESTIAL_DATA_REMOTE": "s3://data/planets",
            "CELESTIAL_WEBHOOK_URL": f"{hook}{HOOK_PATH}",
            "CELESTIAL_WEBHOOK_SECRET": WEBHOOK_SECRET,
        }  # fmt: skip
        yield Remote(project, folder / "state", folder / "s3", database, env, alerts)


# ---------------------------------------------------------------------------------------------- the whole, on servers


@pytest.fixture(scope="module")
def ran(remote: Remote) -> dict[str, Any]:
    "A smoke run that is registered, at the second attempt; what it says of itself."
    away = remote("run", "smoke", code=2, MLFLOW_TRACKING_URI="http://anna:s3cret@127.0.0.1:1")
    assert "127.0.0.1:1 can't be reached" in away and "Traceback" not in away
    remote("run", "smoke", "--set", "register.publish=true")
    return read_json(remote.project / "output/smoke/model.json")


@pytest.mark.remote
@pytest.mark.postgres
def test_a_run_is_on_the_servers(remote: Remote, ran: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(remote.env["MLFLOW_TRACKING_URI"])
    run = client.get_run(ran["lineage"]["mlflow_run"])
    assert run.info.status == "FINISHED" and run.data.params["network"] == "compact"
    assert run.data.metrics["test_accuracy"] == pytest.approx(ran["metrics"]["accuracy"])
    [one] = client.search_model_versions("name = 'celestial'")
    assert one.source.startswith("mlflow-artifacts:"), "the server has the store's keys, its clients have not"
    stored = {path.name: path for path in (remote.store / "artifacts/mlflow").rglob("*") if path.is_file()}
    assert sha256_of(stored["model.onnx"]) == ran["sha256"]
    assert remote.rows("features") > 0


@pytest.mark.remote
@pytest.mark.postgres
def test_a_study_is_in_the_database(remote: Remote, ran: dict[str, Any]) -> None:
    quick = (
        "--set",
        "tune.tune_epochs=1",
        "--set",
        "train.augment=none",
        "--set",
        "tune.space={train.lr: [0.01, 0.03]}",
    )
    remote("tune", "smoke", "--trials", "1", *quick)
    assert remote.rows("studies") == 1 and remote.rows("trials") == 1


@pytest.mark.remote
@pytest.mark.postgres
def test_answers_judgements_and_alerts_leave_the_machine(remote: Remote, ran: dict[str, Any]) -> None:
    port, picture = free_port(), encoded(render("Mars", seed=3))
    command = [str(Path(sys.executable).with_name("celestial")), "serve", "--model", "smoke", "--port", str(port)]
    env = remote.env | {"CELESTIAL_SERVE_LOG_IMAGES": "all"}
    server = subprocess.Popen(
        command, cwd=remote.project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(port, 60)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(3):
                answer = client.post("/predict", files={"image": picture}).raise_for_status().json()
            about = {"request_id": answer["request_id"], "correct": False, "label": "Venus"}
            client.post("/feedback", json=about).raise_for_status()
    finally:
        server.terminate()
        remote.written += server.communicate(timeout=30)[0]
    assert remote.rows("predictions") == 3 and remote.rows("feedback") == 1
    remote("feedback", "accept", "--all", "--by", "anna")
    assert remote.rows("judgements") == 1
    rules = "alerts.rules=[{name: any, metric: answers_new, above: 0}]"
    remote("monitor", "check", "--model", "smoke", "--set", rules, code=1)
    assert [(one["rule"], one["state"]) for one in remote.alerts] == [("any", "firing")]


@pytest.mark.remote
@pytest.mark.postgres
def test_batch_reads_and_writes_the_store(remote: Remote, ran: dict[str, Any]) -> None:
    for name in ("Mars", "Venus", "Moon"):
        (remote.store / f"images/{name}.png").write_bytes(encoded(render(name)))
    (remote.store / "images/bad.png").write_bytes(b"no picture")
    out = "s3://scores/november/planets.parquet"
    about = json.loads(remote("batch", "s3://images", out, "--model", "smoke", "--json"))
    assert (about["out"], about["pictures"], about["answered"]) == (out, 4, 3)
    table = pd.read_parquet(remote.store / "scores/november/planets.parquet")
    assert sorted(table.path) == [f"s3://images/{name}.png" for name in ("Mars", "Moon", "Venus")]
    beside = {path.name for path in (remote.store / "scores/november/planets.batch").iterdir()}
    assert beside == {"job.json", "bad.jsonl", "summary.html"}
    assert about["summary"] == "s3://scores/november/planets.batch/summary.html"
    page = (remote.store / "scores/november/planets.batch/summary.html").read_text()
    assert out in page and str(remote.home) not in page
    before = (remote.store / "scores/november/planets.parquet").read_bytes()
    assert json.loads(remote("batch", "s3://images", out, "--model", "smoke", "--json"))["a_second"] == 0
    assert (remote.store / "scores/november/planets.parquet").read_bytes() == before


@pytest.mark.remote
@pytest.mark.postgres
def test_data_goes_to_the_store(remote: Remote) -> None:
    place = remote.project / "data/labelled/Mars/1.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(encoded(render("Mars")))
    remote("data", "push")
    shutil.rmtree(remote.project / "data/labelled")
    shutil.rmtree(remote.project / ".dvc/cache")
    remote("data", "pull", "data/labelled")
    assert place.is_file() and any((remote.store / "data/planets").rglob("*"))


@pytest.mark.remote
@pytest.mark.postgres
def test_none_of_it_is_on_this_machine(remote: Remote, ran: dict[str, Any]) -> None:
    "No database, no artifact, no answer; and no secret, in any file or in anything that was printed."
    made = [remote.project / name for name in ("output", "data", "params", ".dvc")]
    written = [path for folder in (*made, remote.home) for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(path.parents[0]).as_posix() for path in written}
    assert not [name for name in names if name.endswith(".db") and "dvc" not in name], names
    kept = {path.name for path in remote.home.iterdir()}
    assert not [name for name in kept if name.startswith(("artifacts", "batch", "mlruns"))], kept
    assert not list(remote.project.glob("s3:*")) and not list(remote.project.rglob("planets.parquet"))
    hidden = [
        "s3cret",
        HOOK_PATH,
        WEBHOOK_SECRET,
        *(remote.env[f"AWS_{key}"] for key in ("SECRET_ACCESS_KEY", "ACCESS_KEY_ID")),
    ]
    for secret in hidden:
        assert secret not in remote.written
        assert not [path for path in written if secret.encode() in path.read_bytes()], secret


# ------------------------------------------------------------------------------------------------- what servers refuse


@contextmanager
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen]:
    "A store with pictures, whose keys this process has; a state folder of its own."
    with s3_store(folder / "s3", "images", "scores") as (server, keys), TemporaryHome():
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        for number in range(64):
            (folder / f"s3/images/{number:02}.png").write_bytes(encoded(render("Mars", size=16)) + bytes([number]))
        forget_connections()
        yield server
        forget_connections()


@pytest.mark.remote
def test_what_the_store_refuses_is_an_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A bucket that isn't there, a wrong key, a server that is away: for IN and for OUT; nothing is written, no key shown."

    def refused(images: str, out: str) -> str:
        done = CliRunner().invoke(app, ["batch", images, out, "--model", str(model)])
        assert done.exit_code == 2, done.output
        assert key not in done.output and "Traceback" not in done.output
        return done.output

    with store(tmp_path, monkeypatch) as server:
        key = os.environ["AWS_SECRET_ACCESS_KEY"]
        there, out = str(tmp_path / "s3/images"), "s3://scores/a.parquet"
        refused("s3://nowhere", str(tmp_path / "a.parquet"))
        assert "s3://nowhere/a.parquet" in refused(there, "s3://nowhere/a.parquet")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        forget_connections()
        assert "AWS_SECRET_ACCESS_KEY" in refused(there, out)
        refused("s3://images", str(tmp_path / "a.parquet"))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key)
        server.kill()
        server.wait()
        forget_connections()
        begun = time.monotonic()
        assert "can't be reached" in refused(there, out)
        refused("s3://images", str(tmp_path / "a.parquet"))
        assert time.monotonic() - begun < 60
    assert not list((tmp_path / "s3/scores").iterdir()) and not (tmp_path / "a.parquet").exists()


@pytest.mark.remote
def test_a_store_that_goes_away_loses_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The pictures that can't be read meanwhile aren't bad: the same command goes on with them."
    predictor, out = Predictor(model), "s3://scores/all.parquet"
    with store(tmp_path, monkeypatch) as server, ExitStack() as stack:

        @contextmanager
        def cut() -> Iterator[Engine]:
            begun = []
            with threads(predictor, 1) as engine:

                def result(future: Any) -> Any:
                    begun.append(future)
                    if len(begun) == 2:
                        server.kill()
                        server.wait()
                    return engine.result(future)

                yield Engine(16, lambda: 1, engine.submit, result)

        with pytest.raises(CelestialError) as failure, output(out) as here:
            batch("s3://images", here, predictor, cut(), rows=16)
        assert failure.value.code == "away" and failure.value.exit_code == 2
        again = stack.enter_context(subprocess.Popen(server.args, stderr=subprocess.DEVNULL))
        stack.callback(again.kill)
        wait_for(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
        forget_connections()
        with output(out) as here:
            result = batch("s3://images", here, predictor)
        assert (result.before, result.items, result.bad) in ((16, 64, 0), (32, 64, 0))
        assert len(pd.read_parquet(tmp_path / "s3/scores/all.parquet")) == 64


def test_the_address_of_the_webhook_is_in_the_environment() -> None:
    "It is enough; what can't be sent waits, and the address, which is a secret, is not remembered."
    with TemporaryHome(
        CELESTIAL_WEBHOOK_URL="http://127.0.0.1:1/hook-5f2c", CELESTIAL_WEBHOOK_SECRET=WEBHOOK_SECRET
    ) as home:
        rules = [{"name": "unknown", "metric": "unknown_share", "above": 0.2}]
        p = Params(alerts=Alerts(rules=rules, attempts=1, timeout=2.0))
        about = {"begin": 0.0, "end": 0.0, "answers": 100, "alarms": [], "reasons": []}
        notify(Snapshot(time=60.0, model="a/1", metrics={"unknown_share": 0.3}, **about), p)
        assert len(read_alerts()["waiting"]["webhook"]) == 1 and read_alerts()["failures"].keys() == {"webhook"}
        assert not [f for f in home.path.rglob("*") if f.is_file() and b"hook-5f2c" in f.read_bytes()]


@pytest.mark.remote
def test_mlflow_that_refuses_the_login_is_an_error() -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with web_server(Refuses) as url, TemporaryHome(), pytest.raises(CelestialError) as failure:
        mlflow_client(Track(uri=url.replace("//", "//anna:s3cret@")))
    assert "MLFLOW_TRACKING_PASSWORD" in failure.value.hint and "s3cret" not in str(failure.value)


def test_one_address_is_the_database_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from celestial_ml.data import feature_store
    from celestial_ml.label.store import label_database
    from celestial_ml.model.tune import study_database
    from celestial_ml.monitor.tables import log_database

    monkeypatch.setenv("CELESTIAL_DATABASE_URL", "postgresql://db/all")
    monkeypatch.setenv("CELESTIAL_LABEL_URL", "postgresql://db/labels")
    found = [log_database(), feature_store._database(), study_database(None), label_database()]
    assert [one.url.rpartition("/")[2] for one in found] == ["all", "all", "all", "labels"]
