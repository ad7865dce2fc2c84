"""The prediction log on SQLite and on PostgreSQL: killed, locked, full, deleted, stopped, and what is known afterwards.

PostgreSQL is really started, and stopped and started again, where it's installed; `pytest -m 'not postgres'` leaves
it out.
"""

import inspect
import json
import logging
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from programs import PostgreSQL, free_port, postgresql
from serving import neptune, running, tiny_model, until
from sqlalchemy import Engine, create_engine, func, insert, select, text, update
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

from celestial_ml.cli.app import app
from celestial_ml.core.database import Schema, make_engine, open_database, schema_tables, writing
from celestial_ml.core.errors import CelestialError
from celestial_ml.monitor import day_files, writer
from celestial_ml.monitor.check import _last_id, answers_of
from celestial_ml.monitor.counters import Counters, counters_folder, living, settle
from celestial_ml.monitor.day_files import export_days
from celestial_ml.monitor.live_performance import live_versions
from celestial_ml.monitor.log import PredictionLog, open_log
from celestial_ml.monitor.records import forget, last_answers, log_status, read_records
from celestial_ml.monitor.retention import ImagePolicy
from celestial_ml.monitor.tables import LOG_SCHEMA, log_database, log_table
from celestial_ml.monitor.time_range import embeddings, moment, read_answers

SECRET = PostgreSQL.password


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    with postgresql() as server:
        yield server


@pytest.fixture(autouse=True)
def at_home_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A state folder for each test."
    monkeypatch.delenv("CELESTIAL_LOG_URL", raising=False)
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    "An empty database, of the kind that the test is told."
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path}/log.db"
    return request.getfixturevalue("server").empty_database()


def databases(*marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    "Once for each kind of database, on PostgreSQL with these marks."
    kinds = ["sqlite", pytest.param("postgres", marks=[pytest.mark.postgres, *marks])]
    return pytest.mark.parametrize("url", kinds, indirect=True)


both = databases()
matrix = databases(pytest.mark.slow)  # what does not depend on the dialect of SQL


def answer(i: int = 0, **told: object) -> dict:
    "What a server tells of an answer."
    row = {
        "request_id": f"r{i}", "time": time.time(), "role": "champion", "model_version": "celestial/3",
        "sha256": f"{i:064x}", "width": 128, "height": 96, "format": "JPEG", "bytes": 4000, "brightness": 0.4,
        "contrast": 0.2, "sharpness": 0.1, "embedding": np.arange(64, dtype="float32") + i,
        "probabilities": np.float32([0.75, 0.25]), "classes": ("Mars", "Neptune"), "label": "Mars", "confidence": 0.75,
        "known": True, "ood_score": 1.5, "latency_ms": 2.5, "image": None,
    }  # fmt: skip
    return row | told


def open_log_database(url: str) -> Engine:
    "The log's database."
    return open_database(log_database(url), LOG_SCHEMA)


def rows_of(url: str, table: str = "predictions") -> list[dict]:
    "What is in a table."
    engine = make_engine(log_database(url))
    with engine.connect() as connection:
        found = [dict(row) for row in connection.execute(select(log_table(table))).mappings()]
    engine.dispose()
    return found


@pytest.fixture
def opened() -> Iterator[Callable[..., PredictionLog]]:
    "`open_log`, closed at the end."
    logs: list[PredictionLog] = []

    def open_one(*arguments: object, **options: object) -> PredictionLog:
        logs.append(open_log(*arguments, **options))
        return logs[-1]

    yield open_one
    for one in logs:
        one.close(1)


# What is written


@both
def test_a_row_is_read_as_it_was_recorded(url: str, opened: Callable[..., PredictionLog]) -> None:
    log = opened(url)
    log.record(told := answer(7))
    log.record(
        answer(8, embedding=None, brightness=None, classes=None, probabilities=None, known=False, ood_score=None)
    )
    assert log.flush(30)
    first, second = sorted(rows_of(url), key=lambda row: row["sequence"])
    vectors = {"embedding": "<f2", "probabilities": "<f4"}
    for name, value in told.items():
        if name in vectors:
            assert (np.frombuffer(first[name], vectors[name]) == value).all(), name
        elif name not in ("image", "classes"):
            assert first[name] == value, name
    assert len(first["embedding"]) == 2 * 64 and first["process"] == log.status()["process"]
    assert [(row["id"], json.loads(row["names"])) for row in rows_of(url, "classes")] == [
        (first["classes"], ["Mars", "Neptune"])
    ]
    assert second["embedding"] is second["brightness"] is second["classes"] is None and second["known"] is False
    status = log.status()
    assert (status["answered"], status["written"], status["buffered"], status["lost"]) == (2, 2, 0, 0) and status["ok"]


@matrix
def test_many_threads_record_each_row_once(url: str, opened: Callable[..., PredictionLog]) -> None:
    log = opened(url)

    def work(thread: int) -> None:
        for i in range(500):
            log.record(answer(1000 * thread + i))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert log.flush(60)
    rows = rows_of(url)
    assert len(rows) == len({row["request_id"] for row in rows}) == 4000
    assert sorted(row["sequence"] for row in rows) == list(range(1, 4001))
    log.close()
    [process] = rows_of(url, "processes")
    assert (process["answered"], process["written"], process["lost"], process["last"]) == (4000, 4000, 0, 4000)
    assert process["ended"] >= process["started"]


@matrix
def test_invalid_rows_never_raise_and_do_not_block(
    url: str, opened: Callable[..., PredictionLog], caplog: pytest.LogCaptureFixture
) -> None:
    log = opened(url, images=ImagePolicy("uncertain", 0.6))
    rubbish: list = [
        None, 7, "row", {}, {"request_id": "x"}, answer(time=float("nan")), answer(time=1e300), answer(time="yesterday"),
        answer(embedding=["a"]), answer(width=10**30), answer(width="wide"), answer(classes=7), answer(label="\ud800"),
        {"image": b"x"}, answer(image=7, known=False), answer(image=b"x", confidence=None), answer(bytes=float("inf")),
    ]  # fmt: skip
    for i, row in enumerate(rubbish):
        log.record(row)
        log.record(answer(1000 + i, label="Ma\0rs", embedding=np.float32([1e9, -1e9, np.nan, 0.1])))
    assert log.flush(30)
    status = log.status()
    assert status["ok"] and status["dropped"] == {"buffer_full": 0, "invalid": len(rubbish), "closing": 0}
    assert status["written"] == len(rubbish) == len(rows_of(url)) and status["lost"] == 0
    good = rows_of(url)[0]
    assert good["label"] == "Mars" and np.isinf(np.frombuffer(good["embedding"], "<f2")[:2]).all()
    said = [record for record in caplog.records if not record.name.startswith("psycopg")]  # the driver's own words
    assert len(said) <= 1, "it's said once"


def test_after_close_nothing_raises(opened: Callable[..., PredictionLog], url: str) -> None:
    log = opened(url)
    log.record(answer(1))
    log.close()
    log.close()
    log.record(answer(2))
    status = log.status()
    assert status["state"] == "closed" and status["written"] == 1 and status["dropped"]["closing"] == 1
    with pytest.raises(CelestialError) as refused:
        log.feedback("r1", True)
    assert refused.value.code == "database_unavailable"


def test_import_is_light_and_an_open_log_needs_no_migrations(tmp_path: Path) -> None:
    code = (
        "import sys, json\nimport celestial_ml.monitor.log as log\nimport celestial_ml.cli.log\n"
        "first = sorted(sys.modules)\nlog.open_log().close()\nprint(json.dumps([first, sorted(sys.modules)]))"
    )
    seen = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        seen = json.loads(run.stdout)
    heavy = {"sqlalchemy", "alembic", "pyarrow", "pandas", "mlflow", "tensorflow", "psycopg"}
    assert not heavy & set(seen[0])
    assert heavy & set(seen[1]) == {"sqlalchemy"}, "the second time there is nothing to migrate"


def test_a_process_that_exits_has_written_everything(url: str) -> None:
    run_child(url, "for i in range(500): log.record(answer(i))", wait=60.0).wait(90)
    assert len(rows_of(url)) == 500 and rows_of(url, "processes")[0]["lost"] == 0
    assert not list(counters_folder().iterdir())


# Killed


CHILD = """
import sys, time
import numpy as np
{answer}
from celestial_ml.monitor.log import open_log
{before}
log = open_log({url!r}, **{options!r})
def say(*words): print(*words, flush=True)
def wait(): sys.stdin.readline()
{code}
"""


NEVER = "from celestial_ml.monitor.log import Worker; Worker.attempt = lambda self: time.sleep(600)"  # to open it


def run_child(url: str, code: str, before: str = "", **options: object) -> subprocess.Popen[str]:
    "A process with a log."
    script = CHILD.format(answer=inspect.getsource(answer), url=url, before=before, options=options, code=code)
    return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def heard(child: subprocess.Popen[str]) -> str:
    assert child.stdout
    line = child.stdout.readline().strip()
    assert line, "it ended early"
    return line


@matrix
def test_killed_before_the_database_was_open(url: str, opened: Callable[..., PredictionLog]) -> None:
    child = run_child(url, "for i in range(40): log.record(answer(i))\nsay('done'); wait()", NEVER, delay=1.0)
    heard(child)
    kill(child)
    assert opened(url).status()["lost_before"] == 40
    dead = next(row for row in rows_of(url, "processes") if row["pid"] == child.pid)
    assert (dead["answered"], dead["written"], dead["lost"]) == (40, 0, 40) and dead["ended"]


@matrix
def test_killed_between_two_writes(url: str, opened: Callable[..., PredictionLog]) -> None:
    code = """
for i in range(100): log.record(answer(i))
log.flush(60)
from celestial_ml.monitor import log as module
module.INTERVAL = 600
log.worker.wake.set(); time.sleep(0.5)  # from here on it waits
log.worker.wake.wait = lambda timeout=None: time.sleep(600)
for i in range(7): log.record(answer(100 + i))
say(log.status()['written'], log.status()['buffered']); wait()
"""
    child = run_child(url, code)
    written, buffered = map(int, heard(child).split())
    assert written + buffered == 107
    kill(child)
    assert opened(url).status()["lost_before"] == 107 - len(rows_of(url)) == buffered


def test_killed_while_it_waits_for_a_lock(url: str, opened: Callable[..., PredictionLog]) -> None:
    child = run_child(url, "log.record(answer(0)); log.flush(60); say('go'); wait()\n"
                           "for i in range(25): log.record(answer(1 + i))\nsay('done'); wait()")  # fmt: skip
    heard(child)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        child.stdin.write("\n")
        child.stdin.flush()
        heard(child)
        time.sleep(0.6)
        kill(child)
    assert len(rows_of(url)) == 1
    assert opened(url).status()["lost_before"] == 25


@both
def test_killed_in_the_middle_of_a_transaction(url: str, opened: Callable[..., PredictionLog]) -> None:
    code = """
log.record(answer(0)); log.flush(60)
from celestial_ml.monitor import writer
writer.insert_images = lambda *_: (say('inside'), time.sleep(600))  # the predictions are inserted, not committed
for i in range(9): log.record(answer(1 + i, image=b'x'))
wait()
"""
    child = run_child(url, code, "from celestial_ml.monitor.retention import ImagePolicy", images=ImagePolicy("all"))
    assert heard(child) == "inside"
    kill(child)
    assert len(rows_of(url)) == 1, "all of a transaction or nothing"
    assert opened(url).status()["lost_before"] == 9


@matrix
@pytest.mark.parametrize("moment", [0.9, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (0.4, 1.7))])
def test_killed_under_load_and_the_loss_is_known(
    url: str, opened: Callable[..., PredictionLog], moment: float, tmp_path: Path
) -> None:
    code = f"""
say('go')
with open({str(tmp_path / "told")!r}, 'w', buffering=1) as told:
    for i in range(10**6):
        row = answer(i)
        log.record(row)
        told.write(f"{{i}} {{row['time']}}\\n")
        time.sleep(0.001)
"""
    child = run_child(url, code)
    heard(child)
    time.sleep(moment)
    kill(child)
    told = [line.split() for line in (tmp_path / "told").read_text().splitlines(keepends=True) if line.endswith("\n")]
    there = {row["request_id"] for row in rows_of(url)}
    missing = [float(at) for i, at in told if f"r{i}" not in there]
    lost = opened(url).status()["lost_before"]
    assert lost - len(missing) in (0, 1), "it may die between recording and telling us"
    times = [float(at) for _, at in told]
    stalled = float(np.diff(times).max())  # where a machine has too much to do, the log's thread waits as long
    assert len(told) > 100 and all(at > times[-1] - 1 - 2 * stalled for at in missing), "at most the last second"


@matrix
def test_rows_lost_by_dead_processes_are_counted_once(url: str, opened: Callable[..., PredictionLog]) -> None:
    child = run_child(url, "for i in range(5): log.record(answer(i))\nsay('done'); wait()", NEVER, delay=1.0)
    heard(child)
    first = opened(url)
    assert first.status()["lost_before"] == 0 and len(living(counters_folder())) == 2
    kill(child)
    assert len(living(counters_folder())) == 1
    database = log_database(url)
    with ThreadPoolExecutor(4) as pool:  # whoever comes first
        engines = [open_log_database(url) for _ in range(4)]
        found = list(pool.map(lambda engine: settle(engine, database, counters_folder()), engines))
    for engine in engines:
        engine.dispose()
    assert sum(found) == 5 and settle(open_log_database(url), database, counters_folder()) == 0
    assert opened(url).status()["lost_before"] == 5 and log_status(url)["lost"] == 5
    states = {row["pid"]: row["state"] for row in log_status(url)["processes"]}
    assert states[child.pid] == "ended" and states[os.getpid()] == "running"


def test_dead_processes_of_another_database_are_not_counted(
    url: str, tmp_path: Path, opened: Callable[..., PredictionLog]
) -> None:
    child = run_child(url, "log.record(answer(0)); say('done'); wait()", NEVER, delay=1.0)
    heard(child)
    kill(child)
    assert opened(f"sqlite:///{tmp_path}/other.db").status()["lost_before"] == 0
    assert opened(url).status()["lost_before"] == 1


def test_a_read_only_state_folder_does_not_stop_the_log(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opened: Callable[..., PredictionLog]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/log").write_text("a file where the folder should be")
    log = opened(url)
    log.record(answer())
    assert log.flush(30) and not log.status()["counted"] and log.status()["written"] == 1
    assert log.counters.problem


def test_a_count_file_that_isnt_whole_is_of_nobody(tmp_path: Path) -> None:
    counters, database = Counters(tmp_path, "here"), log_database(f"sqlite:///{tmp_path}/x.db")
    assert {path.suffix for path in tmp_path.iterdir()} == {".count", ".lock"}
    assert counters.path.stat().st_size == 4096 and counters.path.stat().st_blocks * 512 >= 4096
    (tmp_path / "killed.count").write_bytes(b"")  # its process was killed while it made it
    (tmp_path / "earlier.lock").write_bytes(b"")  # or before
    assert settle(open_database(database, LOG_SCHEMA), database, tmp_path) == 0
    assert {p.stem for p in tmp_path.glob("*") if "x.db" not in p.name} == {counters.id}


# Locked, full, gone


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("celestial_ml.monitor")]


def test_a_locked_database_is_waited_for(
    url: str, opened: Callable[..., PredictionLog], caplog: pytest.LogCaptureFixture
) -> None:
    log = opened(url)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        before = datetime.now(UTC)
        for i in range(50):
            log.record(answer(i))
        until(lambda: not log.status()["ok"])
        status = log.status()
        assert status["state"] == "failing" and "database is locked" in status["last_error"]
        assert (datetime.fromisoformat(status["since"]) - before).total_seconds() >= -1
        assert status["buffered"] == 50 and status["behind"] > 0 and status["lost"] == 0
        with pytest.raises(CelestialError) as refused:
            log.feedback("r1", True)
        assert refused.value.code == "database_unavailable"
        assert not log.flush(3), "it can't be written, through several attempts"
        assert len(lines(caplog)) == 1 and "50 answers wait" in lines(caplog)[0]
    assert log.flush(30)
    until(lambda: log.status()["ok"])
    assert len(rows_of(url)) == log.status()["written"] == 50 and log.status()["behind"] == 0
    assert len(lines(caplog)) == 2 and "works again" in lines(caplog)[1]
    assert "locked" in log.status()["last_error"], "what was wrong can still be read"


def test_the_buffer_has_bounds(url: str, opened: Callable[..., PredictionLog]) -> None:
    log = opened(url, images=ImagePolicy("all"), rows=20, image_bytes=1000)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for i in range(30):
            log.record(answer(i, image=bytes([i]) * 300))
        until(lambda: not log.status()["ok"])
        status = log.status()
        assert status["dropped"]["buffer_full"] == 10 and status["buffered"] == 20 and status["images_dropped"] == 17
    assert log.flush(30)
    assert [row["request_id"] for row in rows_of(url)] == [f"r{i}" for i in range(20)], "the oldest are kept"
    assert len(rows_of(url, "images")) == 3
    log.record(answer(99, image=b"x" * 900))
    assert log.flush(30) and len(rows_of(url, "images")) == 4, "the room for images is given back"
    log.close()
    [process] = rows_of(url, "processes")
    assert (process["answered"], process["written"], process["dropped"], process["lost"]) == (31, 21, 10, 0)


def test_a_deleted_database_is_noticed_and_made_again(
    url: str, opened: Callable[..., PredictionLog], caplog: pytest.LogCaptureFixture
) -> None:
    log, file = opened(url), Path(url.removeprefix("sqlite:///"))
    for i in range(30):
        log.record(answer(i))
    assert log.flush(30)
    file.unlink()  # and its journal stays, as with a careless rm
    for i in range(12):
        log.record(answer(100 + i))
    assert log.flush(30)
    until(lambda: log.status()["ok"] and file.exists())
    assert sorted(row["sequence"] for row in rows_of(url)) == list(range(31, 43))
    status = log.status()
    assert (status["answered"], status["written"], status["lost"]) == (42, 12, 30)
    log.feedback("r105", True)
    with pytest.raises(CelestialError) as refused:
        log.feedback("r5", True)
    assert refused.value.code == "unknown_request"
    log.close()
    assert log_status(url)["lost"] == 30 and len(lines(caplog)) == 2


def test_a_folder_that_vanishes_is_waited_for(tmp_path: Path, opened: Callable[..., PredictionLog]) -> None:
    (tmp_path / "mounted").mkdir()
    url = f"sqlite:///{tmp_path}/mounted/log.db"
    log = opened(url)
    log.record(answer(0))
    assert log.flush(30)
    (tmp_path / "mounted").rename(tmp_path / "elsewhere")
    for i in range(5):
        log.record(answer(1 + i))
    until(lambda: not log.status()["ok"])
    assert not (tmp_path / "mounted").exists(), "an unmounted volume isn't replaced by a folder"
    (tmp_path / "elsewhere").rename(tmp_path / "mounted")
    assert log.flush(30) and len(rows_of(url)) == 6 and log.status()["lost"] == 0


def test_a_file_that_is_not_a_database_is_waited_for(url: str, opened: Callable[..., PredictionLog]) -> None:
    file = Path(url.removeprefix("sqlite:///"))
    file.write_bytes(b"this is no database" * 1000)
    log = opened(url)
    log.record(answer(0))
    assert not log.status()["ok"] and "not a database" in log.status()["last_error"]
    file.unlink()
    assert log.flush(30) and len(rows_of(url)) == 1


def test_a_full_disk_by_the_size_of_files(url: str, tmp_path: Path) -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, -1))
for i in range(3000): log.record(answer(i))
while log.status()['ok']: time.sleep(0.02)
say(log.status()['last_error']); wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
say(log.flush(60)); log.close()
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == -1
    child = run_child(url, code)
    assert re.search("disk I/O error|disk is full", heard(child))
    child.stdin.write("\n")
    child.stdin.flush()
    assert heard(child) == "True" and child.wait(60) == 0
    assert sorted(row["sequence"] for row in rows_of(url)) == list(range(1, 3001))
    assert rows_of(url, "processes")[0]["lost"] == 0
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as plain:
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_full_disk_for_real(tmp_path: Path, opened: Callable[..., PredictionLog]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        log = opened(f"sqlite:///{disk}/log.db")
        assert log.status()["ok"]
        (disk / "ballast").write_bytes(bytes(500_000))
        for i in range(3000):
            log.record(answer(i))
        until(lambda: not log.status()["ok"])
        assert "full" in log.status()["last_error"]
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert log.flush(30) and log.status()["lost"] == 0
        assert sorted(row["sequence"] for row in rows_of(f"sqlite:///{disk}/log.db")) == list(range(1, 3001))
        log.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_closing_while_the_database_is_down_is_bounded_and_counted(url: str) -> None:
    log = open_log(url)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for i in range(8):
            log.record(answer(i))
        log.close(0.5)
        assert log.status()["state"] == "closed" and log.status()["dropped"]["closing"] == 8
    assert len(list(counters_folder().glob("*.count"))) == 1
    status = log_status(url)
    [process] = status["processes"]
    assert (status["lost"], status["dropped"], process["answered"], process["written"]) == (0, 8, 8, 0)


@matrix
def test_a_commit_without_an_answer_is_not_written_twice(
    url: str, opened: Callable[..., PredictionLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, real, failures = opened(url), writer.write_batch, []

    def committed_but_lost(*arguments: object) -> None:
        real(*arguments)
        if len(failures) < 2:
            failures.append(1)
            raise OperationalError("COMMIT", None, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(writer, "write_batch", committed_but_lost)
    for i in range(300):
        log.record(answer(i))
        if i % 100 == 50:
            assert log.flush(30)
    assert log.flush(30) and len(failures) == 2
    assert sorted(row["sequence"] for row in rows_of(url)) == list(range(1, 301))
    assert log.status()["written"] == 300 and log.status()["lost"] == 0


@pytest.mark.postgres
def test_postgresql_stops_and_starts_again(
    server: PostgreSQL, opened: Callable[..., PredictionLog], caplog: pytest.LogCaptureFixture
) -> None:
    log = opened(url := server.empty_database())
    for i in range(20):
        log.record(answer(i))
    assert log.flush(30)
    server.stop()
    try:
        for i in range(20, 60):
            log.record(answer(i))
        until(lambda: not log.status()["ok"])
        with pytest.raises(CelestialError) as refused:
            log.feedback("r1", True)
        assert refused.value.code == "database_unavailable"
        assert not log.flush(2)
        late = opened(url, wait=20)  # a server that starts meanwhile runs without its log
        late.record(answer(1000))
        assert not late.status()["ok"] and "connection failed" in late.status()["last_error"]
        with pytest.raises(CelestialError, match="connection failed") as down:
            log_status(url)
    finally:
        server.start()
    assert log.flush(60) and late.flush(60)
    assert len(rows_of(url)) == 61 and log.status()["written"] == 60 and log.status()["lost"] == 0
    log.feedback("r1", True)
    said = [*lines(caplog), str(refused.value), str(down.value), json.dumps([log.status(), late.status()])]
    assert len(lines(caplog)) == 4, "each log says when it fails and when it works again"
    assert "s3cret" not in "".join(said) and SECRET not in "".join(said)


@pytest.mark.postgres
def test_postgresql_cuts_the_connection(server: PostgreSQL, opened: Callable[..., PredictionLog]) -> None:
    log = opened(url := server.empty_database())
    for i in range(400):
        log.record(answer(i))
        if i % 100 == 50:
            engine = create_engine(log_database(server.url("postgres")).url)
            with engine.connect() as connection:
                cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                connection.execute(text(cut + " AND backend_type = 'client backend'"))
            engine.dispose()
        time.sleep(0.002)
    assert log.flush(30)
    assert sorted(row["sequence"] for row in rows_of(url)) == list(range(1, 401)) and log.status()["lost"] == 0


@pytest.mark.postgres
def test_a_look_waits_for_answers_that_are_being_written(
    server: PostgreSQL, opened: Callable[..., PredictionLog]
) -> None:
    "Their ids may be smaller than those of answers that can be read already."
    log, table = opened(url := server.empty_database()), log_table("predictions")
    log.record(answer(0))
    assert log.flush(30)
    row, engine = rows_of(url)[0], make_engine(log_database(url))
    del row["id"]
    with engine.connect() as slow, engine.connect() as other, read_records(url) as reader, ThreadPoolExecutor() as pool:
        slow.execute(insert(table).values(row | {"request_id": "slow"}))
        other.execute(insert(table).values(row | {"request_id": "quick"}))
        other.commit()
        last = pool.submit(_last_id, reader)
        until(lambda: other.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar())
        assert not last.done()
        slow.commit()
        (answers,) = answers_of(reader, "celestial/3", up_to=last.result(30))
    engine.dispose()
    assert {*answers.request_id} == {"r0", "slow", "quick"}


# The schema


@both
def test_the_revisions_lead_to_the_tables_that_the_code_has(url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    options = {"version_table": LOG_SCHEMA.version_table, "compare_type": True}
    with open_log_database(url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts=options), schema_tables(LOG_SCHEMA)) == []


@both
def test_an_old_log_is_brought_up_to_date_and_keeps_its_rows(url: str, opened: Callable[..., PredictionLog]) -> None:
    engine, rows = make_engine(log_database(url)), log_table("predictions")
    with writing(engine) as connection:
        LOG_SCHEMA.migrate(connection, to=1)
        old = {"process": "old", "sequence": 1, "request_id": "before", "time": 1.0, "label": "Mars", "known": True}
        connection.execute(insert(rows).values(old))
    with engine.connect() as connection:
        assert not engine.dialect.has_table(connection, "processes")
    engine.dispose()
    log = opened(url, images=ImagePolicy("all"))
    log.record(answer(1, image=b"x"))
    assert log.flush(30) and {row["request_id"] for row in rows_of(url)} == {"before", "r1"}
    log.feedback("before", True)
    assert len(rows_of(url, "images")) == 1 and version(url) == 3


def version(url: str) -> int:
    engine = make_engine(log_database(url))
    with engine.connect() as connection:
        number = LOG_SCHEMA.version(connection)
    engine.dispose()
    return number


@matrix
def test_a_newer_log_is_refused_and_not_touched(url: str) -> None:
    engine = open_log_database(url)
    with writing(engine) as connection:
        connection.execute(text("UPDATE celestial_version SET version_num = '99'"))
    for use in (open_log, log_status, lambda u: forget(64 * "0", u), lambda u: export_days("nowhere", url=u)):
        with pytest.raises(CelestialError, match=r"version 99.*none after 3") as refused:
            use(url)
        assert "update celestial-ml" in refused.value.hint and refused.value.exit_code == 2
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(log_table("processes"))).scalar() == 0


@matrix
def test_a_migration_that_fails_leaves_what_was_there(url: str) -> None:
    open_log_database(url).dispose()

    def upgrade(op: object) -> None:
        op.execute("CREATE TABLE half (id INTEGER)")
        op.execute("DROP TABLE feedback")
        raise RuntimeError("the power is gone")

    broken = Schema(LOG_SCHEMA.version_table, (*LOG_SCHEMA.revisions, upgrade))
    with pytest.raises(RuntimeError):
        open_database(log_database(url), broken)
    engine = make_engine(log_database(url))
    with engine.connect() as connection:
        assert not engine.dialect.has_table(connection, "half")
    engine.dispose()
    assert version(url) == 3 and rows_of(url, "feedback") == []


@both
def test_many_open_a_new_database_at_once(url: str) -> None:
    code = "log.record(answer(7)); log.flush(60); say(log.status()['ok'], log.status()['last_error'])"
    children = [run_child(url, code, wait=60.0) for _ in range(3)]
    said = [child.communicate(timeout=120)[0].strip() for child in children]
    assert said == ["True None"] * 3
    assert len(rows_of(url)) == 3 and len(rows_of(url, "processes")) == 3 and version(url) == 3


# Feedback


@both
def test_feedback_joins_by_request_and_the_last_counts(url: str, opened: Callable[..., PredictionLog]) -> None:
    log = opened(url)
    log.record(answer(1))
    log.record(answer(2, known=False))
    log.record(answer(1, role="challenger", label="Neptune", model_version="celestial/4"))
    log.feedback("r1", True, None, None)  # it may not be written yet
    assert log.flush(30)
    log.feedback("r1", False, "Neptune", "it's blue\0")
    log.feedback("r2", True)
    for wrong in (
        {"request_id": "r1", "correct": True, "label": "Venus"},
        {"request_id": "r2", "correct": True, "label": "Mars"},
    ):
        with pytest.raises(CelestialError) as refused:
            log.feedback(**wrong)
        assert (refused.value.status, refused.value.code) == (422, "contradictory_feedback")
    for unheard in ("r3", "", "r1'; DROP TABLE feedback; --", "x" * 10_000, "\0"):
        with pytest.raises(CelestialError) as missing:
            log.feedback(unheard, True)
        assert (missing.value.status, missing.value.code) == (404, "unknown_request")
    said = [(row["request_id"], row["correct"], row["label"], row["comment"]) for row in rows_of(url, "feedback")]
    assert said == [("r1", True, "Mars", None), ("r1", False, "Neptune", "it's blue"), ("r2", True, "unknown", None)]
    now = {(a["request_id"], a["role"]): a["correct"] for a in last_answers(10, url)}
    assert now == {("r1", "champion"): False, ("r1", "challenger"): True, ("r2", "champion"): True}


def test_feedback_finds_every_row_while_it_moves(url: str, opened: Callable[..., PredictionLog]) -> None:
    log = opened(url)
    done: list[str] = []

    def work(thread: int) -> None:
        for i in range(40):
            log.record(answer(100 * thread + i))
            log.worker.wake.set()
            log.feedback(f"r{100 * thread + i}", True)
            done.append("one")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 160 == len(rows_of(url, "feedback"))


# Images and forgetting


@matrix
def test_images_by_policy_and_until_their_time(url: str, opened: Callable[..., PredictionLog]) -> None:
    told = [
        answer(1, confidence=0.99, image=b"sure"),
        answer(2, confidence=0.41, image=b"unsure"),
        answer(3, confidence=0.99, known=False, image=b"unknown"),
        answer(4, confidence=0.99, sha256="00000000" + 56 * "f", image=b"drawn"),
    ]
    for policy, kept in {
        ImagePolicy(): set(),
        ImagePolicy("all"): {b"sure", b"unsure", b"unknown", b"drawn"},
        ImagePolicy("uncertain", 0.5): {b"unsure", b"unknown"},
    }.items():
        log = opened(url, images=policy)
        for row in told:
            log.record(row)
            log.record(row)  # the same picture again is kept once
        log.close()
        assert {bytes(row["content"]) for row in rows_of(url, "images")} == kept, policy
        engine = open_log_database(url)
        with writing(engine) as connection:
            connection.execute(update(log_table("images")).values(kept_until=time.time() - 1))
        engine.dispose()
    log = opened(url, images=ImagePolicy("all", days=3))
    assert rows_of(url, "images") == [], "what is over goes"
    log.record(answer(5, image=b"today", time=time.time()))
    log.record(answer(6, image=b"long ago", time=time.time() - 4 * 86400))
    assert log.flush(30)
    log.writer.tidied -= 1000
    log.worker.wake.set()
    until(lambda: len(rows_of(url, "images")) == 1)
    [image] = rows_of(url, "images")
    assert image["content"] == b"today" and 2.9 < (image["kept_until"] - time.time()) / 86400 < 3


def test_a_sample_has_the_configured_share(url: str) -> None:
    policy, draw = ImagePolicy("sample", 0.2), np.random.default_rng(1)
    kept = sum(policy.wants(answer(sha256=draw.bytes(32).hex())) for _ in range(5000))
    assert 850 < kept < 1150


@both
def test_forgetting_a_picture_that_is_being_written(url: str, opened: Callable[..., PredictionLog]) -> None:
    log, gone, kept = opened(url, images=ImagePolicy("all")), 64 * "a", 64 * "b"
    for i in range(10):
        log.record(answer(i, sha256=(gone, kept)[i % 2], image=(b"mine", b"yours")[i % 2]))
    assert log.flush(30)
    for i in range(10):
        log.feedback(f"r{i}", False, "Neptune")
    with writing(open_log_database(url)) as lock:  # what comes now waits in the server's memory
        lock.execute(update(log_table("processes")).values(host="locked"))
        log.record(answer(99, sha256=gone, image=b"mine"))
    assert forget(gone.upper(), url) == {"images": 1, "predictions": 6, "feedback": 5} or log.flush(30)
    assert {row["sha256"] for row in rows_of(url)} == {kept} and len(rows_of(url)) == 5
    assert [row["sha256"] for row in rows_of(url, "images")] == [kept] and len(rows_of(url, "feedback")) == 5
    assert sum(row["predictions"] for row in rows_of(url, "deletions")) == 6
    assert gone not in str(rows_of(url, "deletions"))
    assert forget(kept, url, answers=False) == {"images": 1, "predictions": 0, "feedback": 0}
    assert len(rows_of(url)) == 5
    for wrong in ("a", 64 * "x", "a' OR 1=1 --"):
        with pytest.raises(CelestialError, match="nor a SHA-256"):
            forget(wrong, url)
    log.close()
    assert log_status(url)["lost"] == 0, "what is forgotten isn't lost"


# Export


@both
def test_days_as_parquet(url: str, opened: Callable[..., PredictionLog], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(day_files, "_PIECE", 7)  # several pieces a day
    log, midnight = opened(url), datetime(2026, 3, 2, tzinfo=UTC).timestamp()
    times = [midnight - 1e-3, midnight, *(midnight + 60 * i for i in range(1, 31)), midnight + 86400]
    for i, at in enumerate(times):
        log.record(
            answer(i, time=at, embedding=None if i == 3 else np.full(i % 5, i, "float32"), classes=("a", str(i % 2)))
        )
    log.feedback("r2", True)
    log.feedback("r2", False, "Neptune", "no")
    log.close()
    days = export_days(tmp_path / "out", url=url)
    assert [(day["day"], day["rows"]) for day in days] == [("2026-03-01", 1), ("2026-03-02", 31), ("2026-03-03", 1)]
    table = pd.read_parquet(tmp_path / "out")
    assert len(table) == 33 and set(table.day.astype(str)) == {"2026-03-01", "2026-03-02", "2026-03-03"}
    table = table.set_index("request_id").loc[[f"r{i}" for i in range(33)]]
    assert [at.timestamp() for at in table.time] == pytest.approx(times, abs=1e-6) and str(table.time.dt.tz) == "UTC"
    assert table.embedding["r3"] is None
    for i in (0, 4, 9, 32):
        assert table.embedding[f"r{i}"].tolist() == [i] * (i % 5)
        assert table.classes[f"r{i}"].tolist() == ["a", str(i % 2)]
    assert table.probabilities["r9"].tolist() == [0.75, 0.25] and table.embedding["r9"].dtype == np.float32
    assert table.correct["r2"] is False and table.correct.notna().sum() == 1
    assert (table.feedback_label["r2"], table.feedback_comment["r2"]) == ("Neptune", "no")
    assert set(day_files.export_schema().names) == {"request_id", *table.columns} - {"day"}
    [one] = export_days(tmp_path / "one", "2026-03-02", "2026-03-02", url)
    assert one["rows"] == 31 and [p.name for p in (tmp_path / "one").iterdir()] == ["day=2026-03-02"]
    assert export_days(tmp_path / "none", "2031-01-01", url=url) == [] and not (tmp_path / "none").exists()
    for wrong in (("2026-3-1", None), ("2026-03-02", "2026-03-01"), (None, "today")):
        with pytest.raises(CelestialError, match=r"is not a day|is after"):
            export_days(tmp_path / "out", *wrong, url)


def test_an_export_replaces_a_day_or_leaves_it(
    url: str, opened: Callable[..., PredictionLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(url)
    at = datetime(2026, 3, 2, tzinfo=UTC).timestamp()
    for i in range(20):
        log.record(answer(i, time=at + i, sha256=64 * "a"))
    log.close()
    [day] = export_days(tmp_path / "out", url=url)
    before = Path(day["path"]).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(day_files, "_PIECE", 5)
        real, done = day_files._piece, []

        def breaks(*arguments: object) -> object:
            done.append(1)
            if len(done) == 3:
                raise OSError("No space left on device")
            return real(*arguments)

        patched.setattr(day_files, "_piece", breaks)
        with pytest.raises(CelestialError, match="No space left"):
            export_days(tmp_path / "out", url=url)
    assert Path(day["path"]).read_bytes() == before and len(list(Path(day["path"]).parent.iterdir())) == 1
    forget(64 * "a", url)
    assert export_days(tmp_path / "out", url=url) == [] and not Path(day["path"]).exists()


def test_an_export_needs_the_same_memory_for_any_day(url: str, tmp_path: Path) -> None:
    engine, at = open_log_database(url), datetime(2026, 3, 2, tzinfo=UTC).timestamp()
    fixed = {"process": "p", "request_id": "r", "embedding": np.zeros(256, "<f2").tobytes()}
    rows = [fixed | {"sequence": i, "time": at + (i if i < 4000 else 86400 + i)} for i in range(30_000)]
    with writing(engine) as connection:
        connection.execute(insert(log_table("predictions")), rows)
    code = (
        "import sys, resource; from celestial_ml.monitor import day_files; url, out = sys.argv[1:]\n"
        "for day, rows in ('2026-03-02', 4000), ('2026-03-03', 26_000):\n"
        "    [done] = day_files.export_days(out, day, day, url); assert done['rows'] == rows\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", code, url, tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    small, large = map(int, run.stdout.split())
    assert large - small < 40_000, "kB; in one piece it takes 200,000 more"


@pytest.mark.parametrize(
    ("module", "code", "words"),
    [
        ("pyarrow", "day_files.export_days('out')", "an export needs PyArrow"),
        ("psycopg", "log.open_log('postgresql://anna:s3cret@127.0.0.1/x')", "needs a driver"),
    ],
)
def test_a_missing_library_is_named(module: str, code: str, words: str) -> None:
    script = (
        f"import sys; sys.modules[{module!r}] = None\nfrom celestial_ml.core.errors import CelestialError\n"
        f"from celestial_ml.monitor import day_files, log\ntry: {code}\nexcept CelestialError as e: print(e)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert words in run.stdout and "pip install" in run.stdout and "s3cret" not in run.stdout + run.stderr


@pytest.mark.postgres
def test_a_wrong_password_isnt_shown(server: PostgreSQL, opened: Callable[..., PredictionLog], caplog) -> None:
    url = server.url("postgres").replace("s3cret", "wr0ng")
    with caplog.at_level(logging.DEBUG, logger="celestial_ml"):
        log = opened(url, wait=20)
        log.record(answer(1))
    assert not log.status()["ok"] and "password authentication failed" in log.status()["last_error"]
    said = json.dumps(log.status()) + caplog.text + counters_text()
    assert "wr0ng" not in said and "***" in said


def counters_text() -> str:
    return b"".join(path.read_bytes() for path in counters_folder().iterdir()).decode("latin-1")


@pytest.mark.parametrize(
    "url",
    ["mysql://anna:s3cret@db/x", "sqlite://", "sqlite:///:memory:", "nonsense", "sqlite:///x.db?mode=ro"],
    indirect=False,
)
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    for use in (open_log, log_status):
        with pytest.raises(CelestialError, match="prediction log") as refused:
            use(url)
        assert "s3cret" not in str(refused.value) and refused.value.code != "database_unavailable"


def test_where_the_log_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert log_database().url == f"sqlite:///{tmp_path}/home/predictions.db"
    monkeypatch.setenv("CELESTIAL_LOG_URL", "postgresql://db/x")
    assert log_database().url == "postgresql+psycopg://db/x"
    assert log_database("sqlite:////a/b.db").url == "sqlite:////a/b.db"


# Between two times


@both
def test_what_drift_and_accuracy_read(url: str, opened: Callable[..., PredictionLog]) -> None:
    log, begin = opened(url), datetime(2026, 3, 2, tzinfo=UTC)
    for i in range(300):
        role, version = (("champion", "3"), ("canary", "4"), ("challenger", "5"))[i % 3]
        vector = None if i == 0 else np.full(4 if i % 3 else 6, i, "float32")
        log.record(answer(i, time=begin.timestamp() + i, role=role, model_version=version, embedding=vector))
    assert log.flush(30)
    for i in range(60):
        log.feedback(f"r{i}", i < 45, None if i < 45 else "Neptune")
    read = read_answers(begin, begin.timestamp() + 150, url)
    assert list(read.request_id) == [f"r{i}" for i in range(150) if i % 3 < 2] and read.correct.notna().sum() == 40
    three = read_answers(begin, "2026-03-03", url, model_version="3")
    assert embeddings(three).shape == (99, 6) and set(three.model_version) == {"3"}
    with pytest.raises(CelestialError, match=r"lengths \[4, 6\]"):
        embeddings(read)
    assert 80 <= len(read_answers(begin, "2026-03-03", url, roles=None, most=100)) <= 100
    found = {one["role"]: one for one in live_versions(moment(begin), moment("2026-03-03"), url=url)}
    assert [found[role]["answers"] for role in ("champion", "canary", "challenger")] == [100] * 3
    assert [found[role]["judged"] for role in ("champion", "canary", "challenger")] == [20, 20, 20]
    # The challenger said Mars: right where Mars was right, wrong where it was Neptune.
    assert [found[role]["wrong"] for role in ("champion", "canary", "challenger")] == [5, 5, 5]
    assert found["canary"]["low"] < 0.75 == round(found["canary"]["accuracy"], 9) < found["canary"]["high"]


# Behind the service


def figure(url: str, name: str) -> float:
    "A figure of /metrics; the sum of its labels."
    page = httpx.get(f"{url}/metrics", timeout=30).text
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if re.match(rf"{name}[ {{]", line))


def ask(url: str) -> dict:
    "A picture's answer."
    answered = httpx.post(f"{url}/predict", files={"image": neptune()}, timeout=30)
    assert answered.status_code == 200, answered.text
    return answered.json()


def test_from_the_picture_to_the_export(tmp_path: Path) -> None:
    kept = f"sqlite:///{tmp_path}/home/predictions.db"
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", demo=False, log_images="all") as url:
        ask(url)
        until(lambda: figure(url, "celestial_log_written") == 1)
        said = ask(url)
        time.sleep(1)
        [row] = [row for row in rows_of(kept) if row["request_id"] == said["request_id"]]
        assert {name: row[name] for name in ("label", "confidence", "known", "ood_score", "sha256")} == {
            name: said[name] for name in ("label", "confidence", "known", "ood_score", "sha256")
        }
        assert (row["model_version"], row["role"], row["format"], row["bytes"]) == (
            "tiny/7",
            "champion",
            "PNG",
            len(neptune()),
        )
        assert row["width"] and row["height"] and row["brightness"] is not None and 0 < row["latency_ms"] < 10_000
        assert np.frombuffer(row["probabilities"], "<f4") == pytest.approx(
            list(said["probabilities"].values()), abs=1e-6
        )
        assert len(row["embedding"]) == 3 * 2 and abs(row["time"] - time.time()) < 60
        assert [bytes(image["content"]) for image in rows_of(kept, "images")] == [neptune()]
        feedback = {"request_id": said["request_id"], "correct": False, "label": "Uranus"}
        assert httpx.post(f"{url}/feedback", json=feedback).status_code == 200
        unheard = httpx.post(f"{url}/feedback", json=feedback | {"request_id": "nobody"})
        assert (unheard.status_code, unheard.json()["error"]["code"]) == (404, "unknown_request")
        exported = export_days(tmp_path / "out", url=kept)
        table = pd.read_parquet(tmp_path / "out").set_index("request_id")
        assert sum(day["rows"] for day in exported) == 2 and table.correct.notna().sum() == 1
        assert table.feedback_label[said["request_id"]] == "Uranus"
        assert forget(said["sha256"], kept) == {"images": 1, "predictions": 2, "feedback": 1}
        assert rows_of(kept) == rows_of(kept, "images") == []
    [process] = rows_of(kept, "processes")
    assert process["ended"] and (process["answered"], process["written"], process["lost"]) == (2, 2, 0)
    assert "Traceback" not in (tmp_path / "log").read_text()


@contextmanager
def asked(url: str, clients: int = 4) -> Iterator[list[tuple[float, float, int, str]]]:
    "A service under traffic: when each answer came, the seconds it took, its status and request id."
    seen: list[tuple[float, float, int, str]] = []
    stop = threading.Event()

    def one() -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while not stop.is_set():
                began = time.time()
                try:
                    said = client.post("/predict", files={"image": neptune()})
                except httpx.HTTPError:
                    return  # it was killed
                seen.append((time.time(), time.time() - began, said.status_code, said.json().get("request_id", "")))

    threads = [threading.Thread(target=one) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def served(home: Path, model: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    "The command `celestial serve`, as a person starts it."
    port = free_port()
    command = [str(Path(sys.executable).with_name("celestial")), "serve", "--no-demo", "--model", str(model)]
    env = os.environ | {"CELESTIAL_HOME": str(home)}
    with subprocess.Popen(
        [*command, "--port", str(port)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: is_ready(url))
            yield process, url
        finally:
            process.terminate()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("seconds", [0.3, 1.4, 2.6])
def test_a_service_killed_under_traffic_counts_lost_rows(tmp_path: Path, seconds: float) -> None:
    home, model = tmp_path / "home", tiny_model(tmp_path / "model")
    with served(home, model) as (process, url):
        if seconds > 1:  # else it dies while the log is being opened
            ask(url)
            until(lambda: figure(url, "celestial_log_written") == 1)
        with asked(url) as seen:
            until(lambda: len(seen) > 5)
            time.sleep(seconds)
            process.kill()
            killed = time.time()
    assert process.wait() == -signal.SIGKILL and {status for *_, status, _ in seen} == {200}
    try:
        there = {row["request_id"] for row in rows_of(f"sqlite:///{home}/predictions.db")}
    except Exception:  # it died while the log was being opened
        assert seconds < 1
        there = set()
    missing = [at for at, _, _, name in seen if name not in there]
    stalled = max(took for _, took, *_ in seen)  # where a machine has too much to do
    assert all(at > killed - 1 - stalled for at in missing), "at most the last second"
    with served(home, model) as (_, url):
        ask(url)
        until(lambda: figure(url, "celestial_log_written") == 1)
        lost = figure(url, "celestial_log_lost_before")
        assert len(missing) <= lost <= len(missing) + 4, "four may have been answered and not heard it"
        result = CliRunner().invoke(app, ["log", "status", "--json"])
        assert json.loads(result.stdout)["lost"] == lost


@contextmanager
def locked(home: Path, pid: int) -> Iterator[None]:
    with closing(sqlite3.connect(home / "predictions.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def full(home: Path, pid: int) -> Iterator[None]:
    "As a disk is: no file of the process may grow."
    size = max(path.stat().st_size for path in home.glob("predictions.db*"))
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, -1))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def away(home: Path, pid: int) -> Iterator[None]:
    "The volume isn't mounted."
    home.rename(home.with_name("elsewhere"))
    yield
    home.with_name("elsewhere").rename(home)


@pytest.mark.parametrize("trouble", [locked, full, away])
def test_the_service_goes_on_while_the_log_cannot(
    tmp_path: Path, trouble: Callable[[Path, int], AbstractContextManager[None]]
) -> None:
    kept = f"sqlite:///{tmp_path}/db/predictions.db"
    (tmp_path / "db").mkdir()
    settings = {"log_url": kept, "access_log": False}
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", demo=False, **settings) as url:
        first = ask(url)
        until(lambda: figure(url, "celestial_log_written") == 1)
        with asked(url) as seen:
            time.sleep(2)
            with trouble(tmp_path / "db", int(figure(url, "celestial_process_id"))):
                begin = time.time()
                until(lambda: figure(url, "celestial_log_ok") == 0)
                feedback = httpx.post(
                    f"{url}/feedback", json={"request_id": first["request_id"], "correct": True}, timeout=30
                )
                if trouble is not full or feedback.status_code != 200:  # a few bytes may find a place
                    assert (feedback.status_code, feedback.json()["error"]["code"]) == (503, "log_unavailable")
                time.sleep(2)
                end = time.time()
            until(lambda: figure(url, "celestial_log_ok") == 1)
        until(lambda: figure(url, "celestial_log_buffered") == 0)
        assert {status for *_, status, _ in seen} == {200}
        before = [took for at, took, *_ in seen if at < begin]
        during = [took for at, took, *_ in seen if begin < at < end]
        assert len(before) > 20 < len(during) and np.max(during) < 2 * np.max(before) + 0.5
        assert np.median(during) < 2 * np.median(before), "nobody waits for the log"
        assert figure(url, "celestial_log_dropped_total") == figure(url, "celestial_log_lost") == 0
    assert {row["request_id"] for row in rows_of(kept)} == {first["request_id"], *(name for *_, name in seen)}
    assert len(rows_of(kept, "feedback")) == (feedback.status_code == 200), "what is thanked for is kept"
    assert 1 <= (tmp_path / "log").read_text().count("answers wait in memory") <= (3 if trouble is full else 1)
    assert "Traceback" not in (tmp_path / "log").read_text()


# The command


def test_the_command(celestial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/log.db"
    monkeypatch.setenv("CELESTIAL_LOG_URL", url)
    log = open_log(images=ImagePolicy("all"))
    for i in range(5):
        log.record(answer(i, image=b"x"))
    log.close()

    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["log", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr

    assert run("feedback", "r3", "--wrong", "--label", "Neptune") == "noted: r3 was wrong\n"
    assert "no answered request" in run("feedback", "r9", "--correct", code=2)
    assert "5 answers, 1 feedback, 5 images" in run("status")
    assert json.loads(run("status", "--json"))["predictions"] == 5
    shown = [json.loads(line) for line in run("show", "--last", 2, "--json").splitlines()]
    assert [row["request_id"] for row in shown] == ["r4", "r3"] and shown[1]["correct"] is False
    assert "wrong: Neptune" in run("show")
    today = datetime.now(UTC).date()
    exported = json.loads(run("export", tmp_path / "out", "--json"))
    assert sum(day["rows"] for day in exported) == 5 and Path(exported[-1]["path"]).is_file()
    assert "no answers" in run("export", tmp_path / "out", "--day", "2020-01-01")
    assert "--day" in run("export", tmp_path / "out", "--day", today, "--since", today, code=2)
    forgotten = json.loads(run("forget", f"{3:064x}", "--json"))
    assert forgotten.items() >= {"images": 1, "predictions": 1, "feedback": 1}.items()
    assert "neither a file nor a SHA-256" in run("forget", "r3", code=2)
    assert "there is no prediction log" in run("status", "--url", f"sqlite:///{tmp_path}/no.db", code=2)
    assert not (tmp_path / "no.db").exists()
    real = celestial("log", "status", "--json", CELESTIAL_LOG_URL=url)
    assert real.returncode == 0 and json.loads(real.stdout)["predictions"] == 4
    down = celestial("log", "status", CELESTIAL_LOG_URL="postgresql://anna:s3cret@127.0.0.1:1/x")
    assert down.returncode == 2 and "connection failed" in down.stderr and "Traceback" not in down.stderr
    assert "s3cret" not in down.stderr
