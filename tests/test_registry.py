"The registry with real versions: the gate, what a crash leaves behind, the way back, and the commands."

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from packages import package, photographs
from typer.testing import CliRunner

from celestial_ml.cli.models import models_app
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import read_json, sha256_of, write_json
from celestial_ml.core.params import Register, Track
from celestial_ml.registry.audit import audit_file, read_log, verify
from celestial_ml.registry.decisions import register_version, rollback, submit
from celestial_ml.registry.gate import judge
from celestial_ml.registry.state import champion, recover, sync_aliases
from celestial_ml.registry.tracking import Run, mlflow_client, open_run
from celestial_ml.registry.versions import create_version, damage, publish, published, versions
from celestial_ml.serve.predictor import Predictor, find_model

Models = Callable[..., Result]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A home with a database of MLflow's in it, which takes seconds to make."
    home = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELESTIAL_HOME", str(home))
        mlflow_client(Track()).search_registered_models()
    return home


@pytest.fixture
def home(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A home of one's own."
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes((empty / "mlflow.db").read_bytes())
    monkeypatch.setenv("CELESTIAL_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture
def run(home: Path) -> Iterator[Run]:
    run = open_run(Track(), "a run")
    yield run
    run.end()


@pytest.fixture
def models(home: Path, monkeypatch: pytest.MonkeyPatch) -> Models:
    "Run `celestial models`, as a person would who is in no project."
    monkeypatch.chdir(home)

    def call(*arguments: object) -> Result:
        done = CliRunner().invoke(models_app, list(map(str, arguments)))
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return call


def aliases(run: Run) -> dict[str, int]:
    return {name: int(number) for name, number in run.client.get_registered_model("celestial").aliases.items()}


# ---------------------------------------------------------------------------------------------------- the gate


def test_the_champion_is_asked_about_the_candidates_images(home: Path, run: Run, tmp_path: Path) -> None:
    "Measured elsewhere, it's measured again here; and not on what it has learned from."
    paths, shas = photographs(tmp_path / "new", 40)
    old = package(tmp_path / "a", learned=tuple(shas[:4]))
    assert submit(register_version(old, "celestial", run), Register()).promoted
    good = register_version(package(tmp_path / "b", np.ones(40, bool), shas, paths), "celestial", run)
    verdict = judge(good, "celestial/1", Register())
    assert verdict.decision == "promote", verdict.reasons
    assert "36 asked now, 4 left out because it learned" in verdict.reasons[-1]
    assert verdict.comparison and (verdict.comparison.images, verdict.comparison.other) == (36, 1.0)
    poor = register_version(package(tmp_path / "c", np.arange(40) < 30, shas, paths), "celestial", run)
    lax = Register(min_accuracy=0.5, min_macro_f1=0.5)
    verdict = submit(poor, lax)
    assert verdict.decision == "refuse" and verdict.reasons[0].startswith("worse than the champion (celestial/1)")
    assert [rule.name for rule in verdict.rules if not rule.passed] == ["not worse"]
    for path in paths[:30]:
        Path(path).unlink()
    gone = judge(good, "celestial/1", Register())
    assert gone.decision == "refuse" and "only 10 images can be compared" in gone.reasons[0]
    assert "26 left out because their files aren't here" in gone.reasons[0] and "data.test" in gone.reasons[0]


def test_a_package_that_cannot_be_served_is_no_champion(home: Path, run: Run, tmp_path: Path) -> None:
    folder = package(tmp_path / "a")
    about = read_json(folder / "model.json")
    with np.load(folder / "selftest.npz") as known:
        other = dict(known) | {"probabilities": known["probabilities"][:, ::-1]}
    np.savez(folder / "selftest.npz", **other)
    write_json(
        folder / "model.json", about | {"files": about["files"] | {"selftest.npz": sha256_of(folder / "selftest.npz")}}
    )
    verdict = submit(register_version(folder, "celestial", run), Register())
    assert [rule.name for rule in verdict.rules if not rule.passed] == ["bare serving"]
    assert "fails its self-test" in verdict.reasons[0] and champion() is None


def test_a_gate_that_was_asked_about_the_wrong_champion_is_asked_again(
    home: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Somebody else promotes while the gate is at work: the verdict is about the new champion."
    import celestial_ml.registry.gate as gate

    first, second, third = (
        register_version(package(tmp_path / str(i), share), "celestial", run)
        for i, share in enumerate((0.95, 0.955, 0.96))
    )
    submit(first, Register())
    asked = []

    def slow(model: str, before: str | None, *rest: object) -> gate.Verdict:
        asked.append((model, before))
        if len(asked) == 1:
            submit(second, Register())
        return judge(model, before, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "judge", slow)
    assert submit(third, Register()).champion == second
    assert asked == [(third, first), (second, first), (third, second)]
    assert [e["model"] for e in read_log() if e["action"] == "promote"] == [first, second, third]


# ------------------------------------------------------------------------------------------------- the log


def test_every_decision_is_in_the_log_with_its_evidence(home: Path, run: Run, tmp_path: Path) -> None:
    first = register_version(package(tmp_path / "a"), "celestial", run, "Ada")
    submit(first, Register(), "Ada")
    poor = register_version(package(tmp_path / "b", 0.5), "celestial", run, "Bob")
    submit(poor, Register(), "Bob")
    log = read_log()
    told = [(entry["who"], entry["action"], entry["model"]) for entry in log]
    assert told == [
        ("Ada", "register", first),
        ("Ada", "promote", first),
        ("Bob", "register", poor),
        ("Bob", "refuse", poor),
    ]
    rules = {rule["name"]: rule for rule in log[-1]["evidence"]["rules"]}
    assert rules["accuracy"]["value"] == 0.5 and not rules["accuracy"]["passed"] and rules["not worse"]["limit"] == 0.95
    assert log[-1]["evidence"]["comparison"]["lost"] == 90 and log[-1]["evidence"]["params"]["min_accuracy"] == 0.9
    assert all(entry["previous"] == before["sha256"] for before, entry in pairwise(log))


@pytest.mark.parametrize("byte", range(0, 4000, 397))
def test_no_byte_of_the_log_changes_unnoticed(home: Path, run: Run, tmp_path: Path, byte: int) -> None:
    submit(register_version(package(tmp_path / "a"), "celestial", run), Register())
    content = bytearray(audit_file().read_bytes())
    at = byte % (len(content) - 1)
    content[at] ^= 1
    audit_file().write_bytes(content)
    assert verify().problems, content[max(0, at - 40) : at + 40]
    with pytest.raises(CelestialError, match="doesn't verify"):
        rollback()
    assert champion(), "what is served is served on"


# ----------------------------------------------------------------------------------- kill -9

ZYGOTE = """
import os, sys
from pathlib import Path
import mlflow, mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
from celestial_ml.core.params import Register, Track
from celestial_ml.registry import gate
from celestial_ml.registry.decisions import register_version, rollback, submit
from celestial_ml.registry.state import sync_aliases
from celestial_ml.registry.tracking import open_run

def work(packages):
    run = open_run(Track(), "to be killed")
    print("begins", flush=True)
    while True:
        for folder in packages:
            model = register_version(folder, "celestial", run, "Ada")
            submit(model, Register(), "Ada")
            sync_aliases(run.client)
            rollback("a test", "Ada")
            sync_aliases(run.client)

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        work([Path(p) for p in line.split()])
    print(child, flush=True)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


def wait_for_growth(times: int, deadline: float) -> None:
    "Until the audit log has grown so many times."
    size = audit_file().stat().st_size
    while times and time.monotonic() < deadline:
        if (now := audit_file().stat().st_size) != size:
            size, times = now, times - 1


def test_kill_9_at_20_moments_leaves_a_champion_that_works(home: Path, run: Run, tmp_path: Path) -> None:
    "Half of the moments are random, half are just after a line of the log was written, while the rest is to follow."
    first, second = (package(tmp_path / name, share) for name, share in (("one", 0.95), ("two", 0.955)))
    for folder in (first, second):
        submit(register_version(folder, "celestial", run), Register())
    packages = [str(package(tmp_path / f"{i}", 0.9 + i / 1000)) for i in range(40, 48)]
    dice = random.Random(4)
    zygote = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert zygote.stdin and zygote.stdout and zygote.stdout.readline() == "ready\n"
    behind, torn = 0, 0
    try:
        for moment in range(20):
            zygote.stdin.write(" ".join(dice.sample(packages, len(packages))) + "\n")
            zygote.stdin.flush()
            child = [zygote.stdout.readline(), zygote.stdout.readline()]  # in either order
            pid = int(next(line for line in child if line != "begins\n"))
            if moment % 2:
                wait_for_growth(dice.randint(1, 3), time.monotonic() + 10)
                time.sleep(dice.choice([0, 0, 0.001, 0.003, 0.01]))
            else:
                time.sleep(dice.uniform(0, 1.2))
            os.kill(pid, signal.SIGKILL)
            assert zygote.stdout.readline() == f"{signal.SIGKILL.value}\n", "it was at work until then"

            served = find_model()
            assert damage(served) == [] and Predictor(served).self_test() == 4, "what servers read, before any repair"
            audit = verify()
            assert not audit.problems
            torn += bool(audit.torn)
            pointed = f"{champion()['name']}/{champion()['version']}"
            state = recover()
            behind += pointed != state.champion
            assert champion() == read_json(published(state.champion) / "model.json")
            assert Predictor(find_model()).self_test() == 4
    finally:
        zygote.stdin.close()
        zygote.wait(20)
        zygote.stdout.close()
    print(f"the pointer was behind the log {behind} times, a line torn {torn} times, {len(read_log())} entries")
    register_version(first, "celestial", run)
    sync_aliases(run.client)
    state, told = recover(), aliases(run)
    assert f"celestial/{told['champion']}" == state.champion and f"celestial/{told['previous']}" == state.previous
    assert not list((home / "models").rglob("*.part*")), "the next registration sweeps up"
    assert all(damage(published(model)) == [] for model in versions())


def test_a_decision_whose_line_was_torn_was_never_made(home: Path, run: Run, tmp_path: Path) -> None:
    submit(register_version(package(tmp_path / "a"), "celestial", run), Register())
    whole = audit_file().read_bytes()
    submit(register_version(package(tmp_path / "b", 0.96), "celestial", run), Register())
    entry = audit_file().read_bytes()[len(whole) :]
    write_json(
        home / "models/champion.json", {"model": "celestial/1", "entry": json.loads(whole.splitlines()[-1])["sha256"]}
    )
    for part in (1, len(entry) // 2, len(entry) - 1):
        audit_file().write_bytes(whole + entry[:part])
        assert not verify().problems and recover().champion == "celestial/1"
    assert rollback_refused() and audit_file().read_bytes().startswith(whole)


def rollback_refused() -> bool:
    try:
        rollback()
    except CelestialError as e:
        return "no champion before celestial/1" in e.message
    return False


def test_published_versions_never_change(home: Path, run: Run, tmp_path: Path) -> None:
    "Registering again what is published touches no byte of it, so a server may read it at any time."
    folder = package(tmp_path / "a")
    model = register_version(folder, "celestial", run)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in published(model).iterdir()}
    about = read_json(folder / "model.json")
    about["lineage"]["created"] = "2027-01-01T00:00:00+00:00"
    about["compression"]["files"]["float32"]["ms"] = 0.2
    write_json(folder / "model.json", about)
    assert register_version(folder, "celestial", run) == model
    assert before == {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in published(model).iterdir()}
    write_json(folder / "model.json", about | {"ood_threshold": 1.0})
    assert register_version(folder, "celestial", run) == "celestial/2"


def test_a_home_from_before_the_log_is_taken_over(home: Path, run: Run, tmp_path: Path) -> None:
    model = create_version(package(tmp_path / "a"), "celestial", run)
    publish(tmp_path / "a", model)
    write_json(home / "models/champion.json", {"model": model})
    second = register_version(package(tmp_path / "b", 0.96), "celestial", run)
    assert [(e["action"], e["model"]) for e in read_log()] == [("adopt", model), ("register", second)]
    assert submit(second, Register()).promoted and rollback() == (second, model)


# ------------------------------------------------------------------------------------------- the commands


def test_rollback_moves_what_servers_read_before_it_hears_of_mlflow(home: Path, run: Run, tmp_path: Path) -> None:
    for name, share in (("a", 0.95), ("b", 0.96)):
        submit(register_version(package(tmp_path / name, share), "celestial", run), Register())
    code = (
        "import sys, time; began = time.perf_counter(); import celestial_ml.cli.models;"
        "from celestial_ml.registry.decisions import rollback; rollback('it answers Moon', 'Ada');"
        "slow = {'mlflow', 'pandas', 'numpy', 'onnxruntime', 'scipy', 'tensorflow'} & set(sys.modules);"
        "assert not slow, slow; print(time.perf_counter() - began)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3, "about a third of a second on an idle machine"
    assert champion()["version"] == "1" and read_log()[-1]["evidence"]["why"] == "it answers Moon"
    sync_aliases(run.client)
    assert aliases(run) == {"candidate": 2, "champion": 1}


def test_the_commands_from_the_first_version_to_a_retired_one(
    home: Path, run: Run, models: Models, tmp_path: Path
) -> None:
    for name, share in (("a", 0.95), ("b", 0.96), ("c", 0.5), ("d", 0.97)):
        model = register_version(package(tmp_path / name, share), "celestial", run)
        verdict = submit(model, Register(promote="by_hand" if name in "bd" else "not_worse"), "Ada")
        assert verdict.decision == {"a": "promote", "c": "refuse"}.get(name, "challenge")
    rows = json.loads(models("list", "--json").stdout)
    assert [row["aliases"] for row in rows] == [["champion"], [], [], ["challenger", "candidate"]]
    listed = models("list").stdout
    assert re.search(r"celestial/1 +champion +0\.9500 \(0\.9300 to 0\.9700\)", listed) and "next:" in listed

    refused = models("promote", "celestial/3", "--who", "Bob", "--why", "I like it")
    assert refused.exit_code == 1 and "the gate refuses celestial/3" in refused.stderr
    assert "accuracy 0.5000 is below 0.9" in refused.stderr and read_log()[-1]["action"] == "refuse"
    promoted = models("promote", "challenger", "--who", "Bob", "--why", "watched it")
    assert promoted.exit_code == 0 and "celestial/4 is champion" in promoted.stdout, promoted.stderr
    assert read_log()[-1]["who"] == "Bob" and read_log()[-1]["evidence"]["by_hand"]
    assert aliases(run) == {"candidate": 4, "champion": 4, "previous": 1}

    shown = models("show", "champion")
    assert "✓ not worse" in shown.stdout and "promote   Bob" in shown.stdout
    beside = models("compare", "champion", "previous").stdout
    assert re.search(r"accuracy +0\.9700 +0\.9500", beside) and re.search(r"train\.lr +0\.9700 +0\.9500", beside)
    assert "is neither better nor worse: 0.9700 against 0.9500 on the same 200 images" in beside

    back = models("rollback", "--why", "it answers Moon", "--json")
    assert json.loads(back.stdout) == {"from": "celestial/4", "champion": "celestial/1"}
    assert models("rollback").exit_code == 2
    assert aliases(run) == {"candidate": 4, "champion": 1}

    missing = models("retire", "celestial/1")
    assert missing.exit_code == 1 and "[ ] it has no alias: it's champion" in missing.stderr
    assert "[ ] a successor is named" in missing.stderr
    retired = models("retire", "celestial/3", "--successor", "champion", "--json")
    assert retired.exit_code == 0, retired.stderr
    assert Path(json.loads(retired.stdout)["archive"]).stat().st_size > 1000
    assert "retired for celestial/1" in models("list").stdout and models("show", "celestial/3").exit_code == 0
    assert models("promote", "celestial/3").exit_code == 2

    audit = models("audit")
    assert "Bob: watched it" in audit.stdout and "nobody touched them" in audit.stdout
    audit_file().write_bytes(audit_file().read_bytes().replace(b"Bob", b"Eve"))
    assert models("audit", "--verify").exit_code == 1
    assert models("promote", "celestial/2").exit_code == 2
    assert models("audit", "--restart", "--who", "Ada").exit_code == 0
    assert models("audit", "--verify").exit_code == 0 and champion()["version"] == "1"


def test_a_wrong_name_is_answered_with_the_nearest(home: Path, run: Run, models: Models, tmp_path: Path) -> None:
    assert "nothing is registered" in models("show", "celestial/1").stderr
    register_version(package(tmp_path / "a"), "celestial", run)
    wrong = models("promote", "celestal/1")
    assert wrong.exit_code == 2 and "did you mean 'celestial/1'?" in wrong.stderr
    assert "there is no champion" in models("compare", "celestial/1", "champion").stderr
    assert models("promote", "celestial/1", "--params", "nowhere").exit_code == 2
