"The detector's evidence beside another implementation, its state on the disk, and the tests for people where nothing differs."

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine, delete, event
from ville.evalues import combine, p_to_e

from celestial_ml.core.files import sha256_of, write_json
from celestial_ml.core.params import Params
from celestial_ml.core.testing import TemporaryHome, colour_model
from celestial_ml.monitor.check import check
from celestial_ml.monitor.detectors import Detector
from celestial_ml.monitor.drift_tests import DRIFT_TESTS, Sample, adjust
from celestial_ml.monitor.log import open_log
from celestial_ml.monitor.records import open_records
from celestial_ml.monitor.reference import REFERENCE, logged_figures, write_reference
from celestial_ml.monitor.snapshot import Snapshot
from celestial_ml.monitor.tables import log_table
from celestial_ml.package.graph import Graph


def test_evidence_is_that_of_another_implementation() -> None:
    "Shiryaev and Roberts' sum over all beginnings, of the e-values that `ville` makes of the same p-values."
    rng = np.random.default_rng(3)
    reference, stream = rng.normal(size=(30, 2)).round(1), rng.normal(0.5, 1, (50, 2)).round(1)  # with ties
    detector = Detector(reference, {"a": ["x"], "b": ["y"]}, one_sided=["y"], seed=4)
    for rows in np.split(stream, [1, 20]):
        detector.look(rows)
    draws = np.random.Generator(np.random.PCG64(4)).random(stream.shape)
    logs = []
    for column, high in ((0, 0), (0, 1), (1, 0)):
        p = []
        for i, value in enumerate(stream[:, column]):
            before = np.concatenate([reference[:, column], stream[:i, column]])
            larger, ties = (before > value).sum(), (before == value).sum() + 1
            p.append(abs(high - (larger + draws[i, column] * ties) / (len(before) + 1)))
        for kappa in (0.1, 0.4):
            e = p_to_e(np.array(p), kappa)
            for share in (0.03, 0.1, 0.3, 1.0):
                mixed = combine(np.stack([np.ones_like(e), e]), weights=[1 - share, share], axis=0)
                logs.append(np.log(sum(combine(mixed[begin:], "product") for begin in range(len(mixed)))))
    assert np.allclose(detector.evidence, logs)


def answer(model: Graph, pictures: list[np.ndarray], first: int) -> None:
    "Log answers as a server does, one a second."
    log = open_log()
    for n, row in enumerate(logged_figures(model, pictures).to_dict("records"), first):
        about = {"request_id": f"r{n}", "time": 1e9 + n, "role": "champion", "model_version": model.version}
        log.record(row | about | {"sha256": "0" * 64, "latency_ms": 2.0})
    log.close()


@pytest.fixture
def served() -> Iterator[Path]:
    "A model with a reference, and 300 answers in the log."
    with TemporaryHome() as home:
        folder, rng = home.path / "model", np.random.default_rng(0)
        about = colour_model(folder, gain=0.05)
        model = Graph(folder)
        pictures = [
            (np.eye(3)[i % 3] * rng.uniform(150, 200) + rng.normal(20, 5, (8, 8, 3))).astype(np.uint8)
            for i in range(480)
        ]
        write_reference(folder / REFERENCE, model, pictures[:90], ["red", "green", "blue"] * 30, pictures[90:180])
        write_json(folder / "model.json", about | {"files": {REFERENCE: sha256_of(folder / REFERENCE)}})
        answer(model, pictures[180:], 0)
        yield folder


def test_a_look_that_ends_halfway_counts_no_answer_twice(served: Path) -> None:
    blocked = served.parent / "monitor" / "history.jsonl"
    blocked.mkdir(parents=True)
    with pytest.raises(OSError):
        check(Params(), str(served))
    blocked.rmdir()
    snapshot = check(Params(), str(served))
    assert snapshot.metrics["answers_new"] == 0 and snapshot.answers == 300 and not snapshot.alarms


def test_a_look_reads_no_more_than_it_needs(served: Path) -> None:
    "Each query for the newest answers follows an index: one that follows the table reads all of it where few match."
    plans = list[str]()

    def explain(connection: Any, cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if "FROM predictions" in statement and "ORDER BY" in statement and "EXPLAIN" not in statement:
            plans.extend(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values))

    event.listen(Engine, "before_cursor_execute", explain)
    try:
        check(Params(), str(served))
        answer(Graph(served), [np.full((8, 8, 3), 5, np.uint8)] * 40, 300)
        assert check(Params(), str(served)).alarms
    finally:
        event.remove(Engine, "before_cursor_execute", explain)
    assert len(plans) >= 5 and all("USING" in plan for plan in plans), plans


def test_a_log_that_begins_anew_is_looked_at(served: Path) -> None:
    "Its ids are smaller than the last one that was looked at."
    check(Params(), str(served))
    with open_records() as engine, engine.begin() as connection:
        connection.execute(delete(log_table("predictions")))
    grey = [np.full((8, 8, 3), 5, np.uint8)] * 40
    answer(Graph(served), grey, 300)
    assert check(Params(), str(served)).metrics["answers_new"] == 0
    answer(Graph(served), grey, 340)
    snapshot = check(Params(), str(served))
    assert snapshot.metrics["answers_new"] == 40 and snapshot.alarms


def test_a_damaged_state_begins_anew_and_says_so(served: Path) -> None:
    def reasons(snapshot: Snapshot) -> list[str]:
        "Without those of metrics that other tests of this process have registered."
        return [reason for reason in snapshot.reasons if not reason.startswith(("live:", "held_out:"))]

    check(Params(), str(served))
    state = next((served.parent / "monitor").glob("*.npz"))
    state.write_bytes(state.read_bytes()[:500])
    snapshot = check(Params(), str(served))
    assert snapshot.metrics["answers_new"] == 300 and len(reasons(snapshot)) == 1
    changed = check(Params(monitor={"images": 5000}), str(served))
    assert changed.metrics["answers_new"] == 300 and len(reasons(changed)) == 1
    assert check(Params(monitor={"images": 5000}), str(served)).metrics["answers_new"] == 0


def test_a_change_in_a_later_stretch_of_one_look_has_its_time(served: Path) -> None:
    "Three stretches of 130 in one look; the change is in the third."
    grey = np.full((8, 8, 3), 5, np.uint8)
    answer(Graph(served), [grey] * 20, 300)
    params = Params(monitor={"images": 130})
    (alarm,) = check(params, str(served)).alarms
    assert 300 < alarm.image <= 320 and 1e9 + 290 <= alarm.since_time < 1e9 + alarm.image
    assert check(params, str(served)).alarms == [alarm]


def test_tests_for_people_keep_their_level() -> None:
    "Of 60 pairs of equal samples, at the level 0.05 after correction few differ."
    drifted = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        samples = []
        for n in (80, 120):
            labels = rng.choice(["Mars", "Venus"], n)
            figures = pd.DataFrame(rng.normal(size=(n, 3)) + (labels == "Mars")[:, None], columns=list("abc"))
            samples.append(Sample("", figures, labels, rng.normal(size=(n, 4))))
        p = [one.p for name in DRIFT_TESTS if name != "mmd" for one in DRIFT_TESTS[name](*samples)]
        drifted += bool((adjust(np.array(p)) < 0.05).any())
    assert drifted <= 8
