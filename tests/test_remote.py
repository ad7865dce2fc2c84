"""Everything on servers, by environment variables alone: MLflow, PostgreSQL, a store that speaks S3, a webhook.

The servers are real and on loopback: `pytest -m remote` runs the whole, the refusals run with the others.
"""

import hashlib
import hmac
import json
import os
import secrets
import shutil
import subprocess
import sys
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
from programs import PostgreSQL, free_port, postgresql, s3_store, wait_for, web_server
from projects import copy_project
from serving import encoded
from sqlalchemy import create_engine, text

from celestial_ml.core.files import read_json, sha256_of
from celestial_ml.planets.renderer import render

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
        engine = create_engine(database.url().replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("CREATE DATABASE mlflow"))
        runs = database.url("mlflow").replace("postgresql:", "postgresql+psycopg:")
        there = {"MLFLOW_BACKEND_STORE_URI": runs, "MLFLOW_ARTIFACTS_DESTINATION": "s3://artifacts/mlflow"}
        (folder / "mlflow").mkdir()
        tracking = stack.enter_context(mlflow_server(folder / "mlflow", kept | keys | there))
        project = copy_project(folder / "project")
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
    "A smoke run that is registered; what it says of itself."
    remote("run", "smoke", "--set", "register.publish=true")
    return read_json(remote.project / "output/smoke/model.json")


@pytest.mark.remote
@pytest.mark.postgres
def test_a_run_is_on_the_servers(remote: Remote, ran: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(remote.env["MLFLOW_TRACKING_URI"])
    run = client.get_run(ran["lineage"]["mlflow_run"])
    assert run.info.status == "FINISHED" and "train.epochs" in run.data.params
    assert run.data.metrics["accuracy"] == pytest.approx(ran["metrics"]["accuracy"])
    [one] = client.search_model_versions("name = 'celestial'")
    assert one.source.startswith("mlflow-artifacts:"), "the server has the store's keys, its clients have not"
    stored = {path.name: path for path in (remote.store / "artifacts/mlflow").rglob("*") if path.is_file()}
    assert sha256_of(stored["model.onnx"]) == ran["sha256"] and "model_card.html" in stored
    assert remote.rows("features") > 0


@pytest.mark.remote
@pytest.mark.postgres
def test_a_study_is_in_the_database(remote: Remote, ran: dict[str, Any]) -> None:
    quick = ("--set", "tune.tune_epochs=1", "--set", "train.augment=none", "--set", "tune.space={train.lr: [0.01, 0.03]}")
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
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(3):
                answer = client.post("/predict", files={"image": picture}).raise_for_status().json()
            about = {"request_id": answer["request_id"], "correct": False, "label": "Venus"}
            client.post("/feedback", json=about).raise_for_status()
    finally:
        server.terminate()
        remote.written += server.communicate(timeout=30)[0]
    assert remote.rows("predictions") == 3 and remote.rows("feedback") == 1
    remote("feedback", "accept", "--all", "--by", "anna")
    assert remote.rows("judgements") == 2, "the visitor's, and anna's"
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
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-qf"]):
        subprocess.run(command, cwd=remote.project, check=True, env=remote.env)
    place = remote.project / "data/labelled/Mars/1.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(encoded(render("Mars")))
    remote("data", "push", "data/labelled")
    shutil.rmtree(remote.project / "data/labelled")
    shutil.rmtree(remote.project / ".dvc/cache")
    remote("data", "pull", "data/labelled")
    assert place.is_file() and any((remote.store / "data/planets").rglob("*"))


@pytest.mark.remote
@pytest.mark.postgres
def test_none_of_it_is_on_this_machine(remote: Remote, ran: dict[str, Any]) -> None:
    "No database, no artifact, no answer; and no secret, in any file or in anything that was printed."
    written = [path for folder in (remote.project, remote.home) for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(path.parents[0]).as_posix() for path in written}
    assert not [name for name in names if name.endswith(".db") and "dvc" not in name], names
    assert not {"artifacts", "batch", "mlruns"} & {path.name for path in remote.home.iterdir()}
    assert not list(remote.project.glob("s3:*")) and not list(remote.project.rglob("planets.parquet"))
    hidden = ["s3cret", HOOK_PATH, WEBHOOK_SECRET, *(remote.env[f"AWS_{key}"] for key in ("SECRET_ACCESS_KEY", "ACCESS_KEY_ID"))]
    for secret in hidden:
        assert secret not in remote.written
        assert not [path for path in written if secret.encode() in path.read_bytes()], secret
