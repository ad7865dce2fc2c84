"The label store when processes are killed and people write at the same time: no accepted label is lost, no file is half."

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import postgresql
from typer.testing import CliRunner

from celestial_ml.cli.feedback import feedback_app
from celestial_ml.core.files import sha256_of
from celestial_ml.core.testing import TemporaryHome
from celestial_ml.label.labelled import LABELLED, write_labelled
from celestial_ml.label.page import LabelDesk, step
from celestial_ml.label.queue import Waiting, enqueue
from celestial_ml.label.store import (
    Judgement,
    accepted,
    forget_label,
    propose,
    read_judgements,
    review,
    withdraw,
)


@pytest.fixture
def home() -> Iterator[TemporaryHome]:
    with TemporaryHome() as home:
        yield home


def pictures(count: int, begin: int = 0) -> dict[str, bytes]:
    "Files of noise, by checksum."
    files = []
    for i in range(count):
        noise = np.random.default_rng(begin + i).integers(0, 256, (24, 24, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        files.append(file.getvalue())
    return {sha256_of(one): one for one in files}


def label_on(root: Path, begin: int, acknowledged: int) -> None:
    "Two people label picture after picture; each accepted one is acknowledged, then written for training."
    for i in range(10_000):
        [(sha256, content)] = pictures(1, begin + i).items()
        propose([Judgement(sha256, f"class {i % 3}", "anna", "page")], {sha256: content}, people=2)
        propose([Judgement(sha256, f"class {i % 3}", "bert", "page")], people=2)
        os.write(acknowledged, f"{sha256}\n".encode())
        write_labelled(root)


def killed_at_once(root: Path, begin: int, seconds: float) -> set[str]:
    "Label in a process of its own, kill it, and return what was acknowledged."
    out, end = os.pipe()
    child = os.fork()
    if not child:
        try:
            label_on(root, begin, end)
        finally:
            os._exit(1)
    os.close(end)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(out) as lines:
        return {line.strip() for line in lines.read().splitlines() if len(line) == 64}


@pytest.mark.parametrize("moments", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_loses_no_accepted_label(home: TemporaryHome, tmp_path: Path, moments: int) -> None:
    acknowledged: set[str] = set()
    rng = np.random.default_rng(moments)
    propose([], url=None)  # the tables are there
    for moment in range(moments):
        acknowledged |= killed_at_once(tmp_path, 10_000 * moment, rng.uniform(0.02, 0.5))
        for path in (tmp_path / LABELLED).rglob("*.png"):
            if not path.name.startswith("."):
                assert sha256_of(path) == path.stem, "a half-written picture"
        stored = {one.sha256 for one in accepted()}
        assert acknowledged <= stored
    counts = write_labelled(tmp_path)
    files = {path.stem: path for path in (tmp_path / LABELLED).rglob("*.png")}
    assert counts["accepted"] == len(stored) == len(files) > 0 and files.keys() == stored
    assert all(sha256_of(path) == name for name, path in files.items())
    assert not [path for path in tmp_path.rglob(".*") if ".part" in path.name]
    assert (tmp_path / LABELLED / "labels.csv").read_text().count("\n") == len(files) + 1


def test_people_label_at_the_same_time(home: TemporaryHome) -> None:
    files = pictures(12)
    failures: list[BaseException] = []

    def person(name: str) -> None:
        try:
            for sha256, content in files.items():
                propose([Judgement(sha256, "Mars", name, "page")], {sha256: content}, people=2)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=person, args=(name,)) for name in ("anna", "bert", "carl")]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert failures == [] and {one.sha256 for one in accepted()} == files.keys()
    assert all(one.annotator.count(";") == 2 for one in accepted())


def test_bad_requests_as_a_person_types_them(home: TemporaryHome, monkeypatch: pytest.MonkeyPatch) -> None:
    "Two people who disagree, a picture that was deleted, one that nobody sent: an answer, and nothing changes."
    (home.path / "pipeline.yaml").touch()
    monkeypatch.chdir(home.path)
    files = pictures(3)
    first, second, third = files
    propose([Judgement(sha, "Ceres", "anna", "page") for sha in (first, second)], files)
    propose([Judgement(first, "Vesta", "bert", "page")])
    forget_label(second)
    before = read_judgements()
    for words in ([first], [second], [second, "--label", "Ceres"], [third, "--label", "Ceres"], [third, "--reject"]):
        result = CliRunner().invoke(feedback_app, ["accept", *words])
        assert result.exit_code == 2 and "Traceback" not in result.output, (words, result.output)
    assert read_judgements() == before and not (home.path / LABELLED).exists()
    enqueue([Waiting(first)])
    desk = LabelDesk()
    assert first in step(desk, "carl", None, ["Mars"])
    forget_label(first)  # while it is on the desk
    step(desk, "carl", {"do": "label", "sha256": first, "label": "Mars"}, ["Mars"])
    assert "deleted" in desk.notice and read_judgements() == []


SERVED = """
import sys
from celestial_ml.package.deployment_check import TRAINING
sys.modules |= dict.fromkeys([*TRAINING, "cleanlab"])  # importing one of them is an error
import io
import numpy as np
from PIL import Image
from typer.testing import CliRunner
from celestial_ml.cli.feedback import feedback_app
from celestial_ml.core.files import sha256_of
from celestial_ml.label import page, queue
from celestial_ml.label.agreement import kappas
from celestial_ml.label.store import read_judgements
from celestial_ml.label.strategies import STRATEGIES
rng, files = np.random.default_rng(0), []
for i in range(24):
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (i, 0, 0)).save(file, "PNG")
    files.append(file.getvalue())
rows = [queue.Waiting(sha256_of(one), embedding=rng.normal(i % 2, 0.1, 4)) for i, one in enumerate(files)]
queue.enqueue(rows, {sha256_of(one): one for one in files})
for name in STRATEGIES:
    assert queue.rank(name) == 24
for who in ("anna", "bert"):
    desk = page.LabelDesk()
    page.step(desk, who, None, ["Mars", "Moon"])
    for _ in range(20):
        label = "Mars" if desk.turn.waiting.embedding[0] < 0.5 else "Moon"
        page.step(desk, who, {"do": "label", "sha256": desk.turn.waiting.sha256, "label": label}, ["Mars", "Moon"])
        assert not desk.notice, desk.notice
people = CliRunner().invoke(feedback_app, ["list", "--people"])
assert people.exit_code == 2 and "[train]" in people.output, people.output
print(queue.rank("margin"), kappas(read_judgements())[0]["kappa"])
"""


def test_the_page_works_where_only_the_serving_side_is_installed(home: TemporaryHome) -> None:
    "Without scikit-learn and pandas: every strategy, labels of two people, and their agreement."
    done = subprocess.run([sys.executable, "-c", SERVED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["4", "1.0"], done.stderr


@pytest.mark.postgres
def test_the_store_may_be_postgresql(home: TemporaryHome) -> None:
    with postgresql() as server:
        os.environ["CELESTIAL_LABEL_URL"] = server.empty_database()
        files = pictures(2)
        first, second = files
        assert propose([Judgement(sha, "Ceres", "anna", "page") for sha in files], files) == 2
        assert propose([Judgement(first, "Ceres", "bert", "page")], people=2) == 1
        assert review({second: "unknown"}, "rosa") == {"accepted": 1, "rejected": 1}
        assert {one.sha256: one.label for one in accepted()} == {first: "Ceres", second: "unknown"}
        assert withdraw(first, "bert", people=2) and len(accepted()) == 1 and forget_label(second) == 2
