"The registry with real versions: the gate, what a crash leaves behind, the way back, and the commands."

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from packages import package, photographs
from serving import until
from typer.testing import CliRunner

from celestial_ml.cli.models import models_app
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import read_json, sha256_of, write_json
from celestial_ml.core.params import Register, Track
from celestial_ml.core.testing import mlflow_database
from celestial_ml.demo.side_by_side import published_versions
from celestial_ml.package.manifest import damage
from celestial_ml.package.published import find_model, published, versions
from celestial_ml.registry.audit import append, audit_file, read_log, verify
from celestial_ml.registry.decisions import register_version, retire, rollback, submit
from celestial_ml.registry.gate import judge
from celestial_ml.registry.state import champion, recover, sync_aliases
from celestial_ml.registry.tracking import Run, open_run
from celestial_ml.registry.versions import create_version, publish, read_version
from celestial_ml.serve.predictor import Predictor

Models = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A state folder with an empty registry."
    folder = tmp_path / "home"
    mlflow_database(folder / "mlflow.db")
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


def wait_for_aliases(run: Run, wanted: dict[str, int]) -> None:
    "A process of its own tells MLflow."
    until(lambda: aliases(run) == wanted, 90, 0.2)


# ---------------------------------------------------------------------------------------------------- the gate


def test_the_champion_answers_the_candidates_images(home: Path, run: Run, tmp_path: Path) -> None:
    "Measured elsewhere, it's measured again here; and not on what it has learned from."
    paths, shas = photographs(tmp_path / "new", 40)
    old = package(tmp_path / "a", learned=tuple(shas[:4]))
    assert submit(register_version(old, "celestial", run), Register()).promoted
    good = register_version(package(tmp_path / "b", np.ones(40, bool), shas, paths), "celestial", run)
    verdict = judge(good, "celestial/1", Register())
    assert verdict.decision == "challenge", "so few images can't tell: noise neither promotes nor blocks"
    assert "points worse than the champion (celestial/1), of 5 allowed" in verdict.reasons[-1]
    verdict = judge(good, "celestial/1", Register(max_doubt=0.1))
    assert verdict.decision == "promote", verdict.reasons
    assert "36 answered now, 4 left out because it was trained" in verdict.reasons[-1]
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
    assert "26 left out because their files are missing" in gone.reasons[0] and "data.test" in gone.reasons[0]


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


def test_the_gate_judges_again_when_the_champion_has_changed(
    home: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Somebody else promotes while the gate is running: the verdict is about the new champion."
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


def test_every_changed_byte_of_the_log_is_noticed(home: Path, run: Run, tmp_path: Path) -> None:
    submit(register_version(package(tmp_path / "a"), "celestial", run), Register())
    whole = audit_file().read_bytes()
    for byte in range(0, 4000, 397):
        content, at = bytearray(whole), byte % (len(whole) - 1)
        content[at] ^= 1
        audit_file().write_bytes(content)
        assert verify().problems, content[max(0, at - 40) : at + 40]
        with pytest.raises(CelestialError, match="doesn't verify"):
            rollback()
        assert champion(), "what is served is served on"


# ----------------------------------------------------------------------------------- kill -9

ZYGOTE = """
import os, sys
from itertools import cycle
from pathlib import Path
import mlflow, mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
from celestial_ml.core.params import Register, Track
from celestial_ml.registry import gate
from celestial_ml.registry.decisions import register_version, rollback, submit
from celestial_ml.registry.state import recover, sync_aliases
from celestial_ml.registry.tracking import open_run

def work(first, packages):
    run, model = open_run(Track(), "to be killed"), recover().candidates["celestial"]
    steps, began = cycle(["register", "promote", "rollback"]), False
    for step in steps:
        began = began or step == first
        if not began:
            continue
        print(step, flush=True)
        if step == "register":
            model = register_version(Path(packages.pop()), "celestial", run, "Ada")
        elif step == "promote":
            submit(model, Register(), "Ada")
            sync_aliases(run.client)
        elif recover().previous:
            rollback("a test", "Ada")
            sync_aliases(run.client)

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.stdin.close()
        work(line.split()[0], line.split()[1:])
    print(f"pid {child}", flush=True)
    print(f"ended {os.WTERMSIG(os.waitpid(child, 0)[1])}", flush=True)
"""
STEPS = ("register", "promote", "rollback")


class Killer:
    "A process that forks workers that have MLflow imported already."

    def __init__(self) -> None:
        command = [sys.executable, "-c", ZYGOTE]
        self.zygote = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.wait_for("ready")

    def wait_for(self, word: str) -> str:
        "The rest of the next line that begins with this word."
        for line in self.zygote.stdout or ():
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise AssertionError(f"the worker ended before {word!r}")

    def start(self, step: str, packages: list[str]) -> int:  # its process id
        "Have a worker register, promote and roll back in turn, beginning with one of these."
        assert self.zygote.stdin
        self.zygote.stdin.write(" ".join([step, *packages]) + "\n")
        self.zygote.stdin.flush()
        pid = int(self.wait_for("pid"))  # it has much to import yet, so this line is the first
        self.wait_for(step)
        return pid

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert self.wait_for("ended") == f"{signal.SIGKILL.value}", "it was at work until then"

    def close(self) -> None:
        assert self.zygote.stdin and self.zygote.stdout
        self.zygote.stdin.close()
        self.zygote.wait(20)
        self.zygote.stdout.close()


def wait_for_a_line(size: int) -> None:
    "Until the audit log is longer than this."
    deadline = time.monotonic() + 30
    while audit_file().stat().st_size == size and time.monotonic() < deadline:
        time.sleep(0.0002)


def check_what_is_served() -> tuple[str, str, bool]:  # the champion before and after recovery; a line was torn
    "What a server reads now works, and what the log says agrees with it after recovery."
    served = find_model()
    assert damage(served) == [] and Predictor(served).self_test() == 4, "before any repair"
    audit, pointed = verify(), champion()
    assert not audit.problems and pointed
    state = recover()
    assert state.champion and champion() == read_version(state.champion)
    assert damage(find_model()) == [] and Predictor(find_model()).self_test() == 4
    return pointed.model, state.champion, bool(audit.torn)


def test_kill_9_at_20_moments_leaves_a_champion_that_works(home: Path, run: Run, tmp_path: Path) -> None:
    "Half of the moments are anywhere in a step, half just after its line is in the log, while the rest is to follow."
    first, second = (package(tmp_path / name, share) for name, share in (("one", 0.95), ("two", 0.955)))
    for folder in (first, second):
        assert submit(register_version(folder, "celestial", run), Register()).promoted
    packages = [str(package(tmp_path / f"{i}", 0.94 + i / 1000)) for i in range(12)]
    dice, killer, begun = random.Random(4), Killer(), [time.monotonic()]
    behind, torn, taken = 0, 0, {}
    try:
        pid = killer.start("register", list(packages))
        for step in ("promote", "rollback", "register"):  # once undisturbed, to see how long each takes
            begun.append(time.monotonic())
            killer.wait_for(step)
        killer.kill(pid)
        ends = [*begun[2:], time.monotonic()]
        taken = {step: end - start for step, start, end in zip(STEPS, begun[1:], ends, strict=True)}
        for moment in range(20):
            step = STEPS[moment % 3]
            if step == "rollback" and not recover().previous:
                submit(
                    "celestial/1" if recover().champion == "celestial/2" else "celestial/2", Register(), by_hand=True
                )
            size = audit_file().stat().st_size
            pid = killer.start(step, dice.sample(packages, len(packages)))
            if moment % 2:
                wait_for_a_line(size)
                time.sleep(dice.choice([0, 0, 0.0005, 0.002, 0.01]))
            else:
                time.sleep(dice.uniform(0, taken[step]))
            killer.kill(pid)
            pointed, said, half = check_what_is_served()
            behind, torn = behind + (pointed != said), torn + half
    finally:
        killer.close()
    actions = [entry["action"] for entry in read_log()]
    print(f"the pointer was behind the log {behind} times, a line torn {torn} times; {taken}; {actions}")
    assert {"register", "promote", "rollback"} <= set(actions[4:]), "each was done while it was killed now and then"
    register_version(first, "celestial", run)
    sync_aliases(run.client)
    state, told = recover(), aliases(run)
    assert f"celestial/{told['champion']}" == state.champion
    assert (f"celestial/{told['previous']}" if "previous" in told else None) == state.previous
    assert not list((home / "models").rglob("*.part*")), "the next registration sweeps up"
    assert all(damage(published(model)) == [] for model in versions())


# --------------------------------------------------------------------------- killed before each change of the disk


def dies_at(point: int, action: Callable[[], object]) -> bool:
    "Do it in a process that is killed just before its point-th change of the disk, or in it; whether there was one."
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status), "the action failed by itself"
        return os.WIFSIGNALED(status)
    left = [point]

    def mortal(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call

    try:
        for name in ("write", "replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate", "utime"):
            setattr(os, name, mortal(name, getattr(os, name)))
        action()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("what", ["register", "promote", "rollback", "retire"])
def test_a_decision_killed_at_any_write_is_done_or_not_done(
    home: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    "Each point in turn; done again afterwards it ends as if nothing had happened."
    import celestial_ml.registry.decisions as decisions
    import celestial_ml.registry.gate as gate

    for name, share in (("a", 0.95), ("b", 0.955), ("c", 0.96)):
        model = register_version(package(tmp_path / name, share), "celestial", run)
        submit(model, Register(promote="by_hand" if name == "c" else "not_worse"))
    if what == "retire":
        submit("celestial/3", Register(), by_hand=True)
    fresh = package(tmp_path / "d", 0.965)
    numbered = create_version(fresh, "celestial", run)
    verdict = judge("celestial/3", recover().champion, Register(), by_hand=True)
    monkeypatch.setattr(gate, "judge", lambda *_: verdict)  # its evidence is recorded: no process of its own, no MLflow
    monkeypatch.setattr(decisions, "create_version", lambda *_: numbered)
    monkeypatch.setattr(decisions, "sync_aliases", lambda _: None)
    actions: dict[str, Callable[[], object]] = {
        "register": lambda: register_version(fresh, "celestial", run),
        "promote": lambda: submit("celestial/3", Register(), by_hand=True),
        "rollback": lambda: rollback("a test"),
        "retire": lambda: retire("celestial/1", "celestial/3"),
    }
    done: dict[str, Callable[[], bool]] = {
        "register": lambda: recover().candidates["celestial"] == "celestial/4",
        "promote": lambda: recover().champion == "celestial/3",
        "rollback": lambda: recover().champion == "celestial/1",
        "retire": lambda: "celestial/1" in recover().retired,
    }
    point, found = 0, []
    while True:
        point += 1
        copy = tmp_path / f"home-{point}"
        shutil.copytree(home, copy, ignore=shutil.ignore_patterns("mlflow.db", "artifacts"))
        monkeypatch.setenv("CELESTIAL_HOME", str(copy))
        if not dies_at(point, actions[what]):
            break
        pointed, said, torn = check_what_is_served()
        found.append((done[what](), pointed != said, torn))
        if not done[what]():
            actions[what]()
        assert done[what]() and not verify().problems
        assert all(damage(published(model)) == [] or read_version(model).retired for model in versions())
        if what == "retire":
            assert {p.name for p in published("celestial/1").iterdir()} <= {
                "retired.json",
                "gate.json",
                "model_card.md",
            }
    print(what, found)
    # Something follows the line; of a registration only that the lock's note of its owner goes.
    assert len(found) >= 3 and {finished for finished, _, _ in found} == {False, True}
    assert what != "register" or [finished for finished, _, _ in found].count(True) == 1
    assert any(torn for _, _, torn in found), "a line was torn once"
    assert what not in ("promote", "rollback") or any(behind for _, behind, _ in found)


def test_a_decision_with_a_half_written_line_was_never_made(home: Path, run: Run, tmp_path: Path) -> None:
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


def test_a_state_folder_older_than_the_log_is_migrated(home: Path, run: Run, tmp_path: Path) -> None:
    model = create_version(package(tmp_path / "a"), "celestial", run)
    publish(tmp_path / "a", model)
    write_json(home / "models/champion.json", {"model": model})
    second = register_version(package(tmp_path / "b", 0.96), "celestial", run)
    assert [(e["action"], e["model"]) for e in read_log()] == [("adopt", model), ("register", second)]
    assert submit(second, Register()).promoted and rollback() == (second, model)


# ------------------------------------------------------------------------------------------- the commands


def test_rollback_moves_the_servers_pointer_before_mlflow(home: Path, run: Run, tmp_path: Path) -> None:
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
    assert champion().model == "celestial/1" and read_log()[-1]["evidence"]["why"] == "it answers Moon"
    sync_aliases(run.client)
    assert aliases(run) == {"candidate": 2, "champion": 1}


def test_a_retrained_twin_is_nothing_new(home: Path, run: Run, models: Models, tmp_path: Path) -> None:
    "The same answers under another number: the champion stays, and nobody is shown the twin."
    first = register_version(package(tmp_path / "a"), "celestial", run)
    submit(first, Register())
    again = package(tmp_path / "b")
    (again / "notes.json").write_text("{}")  # a file that differs from training to training
    about = read_json(again / "model.json")
    files = about["files"] | {"notes.json": sha256_of(again / "notes.json")}
    write_json(again / "model.json", about | {"files": files})
    twin = register_version(again, "celestial", run)
    assert twin != first
    verdict = submit(twin, Register())
    assert verdict.decision == "same" and not verdict.promoted and "nothing new" in verdict.reasons[-1]
    assert recover().champion == first and recover().aside == {twin: "nothing new"}
    assert recover().candidates == {} and list(published_versions()) == [first]
    sync_aliases(run.client)
    assert aliases(run) == {"champion": 1}
    by_hand = models("promote", twin)
    assert by_hand.exit_code == 1 and "nothing new" in by_hand.stderr and recover().champion == first
    better = register_version(package(tmp_path / "c", np.ones(200, bool)), "celestial", run)
    assert f"next:  celestial models promote {better}" in models("compare", better, first).stdout
    assert "promote" not in models("compare", twin, first).stdout


def test_the_commands_from_the_first_version_to_a_retired_one(
    home: Path, run: Run, models: Models, tmp_path: Path
) -> None:
    for name, share in (("a", 0.95), ("b", 0.96), ("c", 0.5), ("d", 0.97)):
        model = register_version(package(tmp_path / name, share), "celestial", run)
        verdict = submit(model, Register(promote="by_hand" if name in "bd" else "not_worse"), "Ada")
        assert verdict.decision == {"a": "promote", "c": "refuse"}.get(name, "challenge")
    rows = json.loads(models("list", "--json").stdout)
    assert [row["aliases"] for row in rows] == [["champion"], [], [], ["challenger", "candidate"]]
    assert [row["aside"] for row in rows] == [None, None, "refused", None]
    assert list(published_versions()) == ["celestial/4", "celestial/2", "celestial/1"], "nobody compares refused ones"
    listed = models("list").stdout
    assert re.search(r"celestial/1 +champion +0\.9500 \(0\.9300 to 0\.9700\)", listed) and "next:" in listed

    refused = models("promote", "celestial/3", "--who", "Bob", "--why", "I like it")
    assert refused.exit_code == 1 and "the gate refuses celestial/3" in refused.stderr
    assert "accuracy 0.5000" in refused.stderr and read_log()[-1]["action"] == "refuse"
    promoted = models("promote", "challenger", "--who", "Bob", "--why", "watched it")
    assert promoted.exit_code == 0 and "celestial/4 is champion" in promoted.stdout, promoted.stderr
    assert read_log()[-1]["who"] == "Bob" and read_log()[-1]["evidence"]["by_hand"]
    wait_for_aliases(run, {"candidate": 4, "champion": 4, "previous": 1})

    shown = models("show", "champion")
    assert re.search(r"✓ +not worse", shown.stdout) and re.search(r"promote +Bob", shown.stdout)
    beside = models("compare", "champion", "previous").stdout
    assert re.search(r"accuracy +0\.9700 +0\.9500", beside) and re.search(r"train\.lr +0\.9700 +0\.9500", beside)
    assert "is neither better nor worse: 0.9700 against 0.9500 on the same 200 images" in beside
    assert "promote" not in beside and "next:  celestial models show celestial/4" in beside
    assert "next:  celestial models show celestial/4" in models("compare", "celestial/3", "celestial/4").stdout

    back = models("rollback", "--why", "it answers Moon", "--json")
    assert json.loads(back.stdout) == {"from": "celestial/4", "champion": "celestial/1"}
    assert models("rollback").exit_code == 2
    wait_for_aliases(run, {"candidate": 4, "champion": 1})
    append("keep", "celestial/1", "stays champion", {})
    assert "lag behind" in models("list").stdout
    assert models("sync").exit_code == 0 and "lag behind" not in models("list").stdout

    missing = models("retire", "celestial/1")
    assert missing.exit_code == 1 and "[ ] it has no alias: it's champion" in missing.stderr
    assert "[ ] a successor is named" in missing.stderr
    retired = models("retire", "celestial/3", "--successor", "champion", "--json")
    assert retired.exit_code == 0, retired.stderr
    assert Path(json.loads(retired.stdout)["archive"]).stat().st_size > 1000
    assert "retired for celestial/1" in models("list").stdout and models("show", "celestial/3").exit_code == 0
    assert models("promote", "celestial/3").exit_code == 2

    audit = models("audit")
    assert re.search(r"Bob +watched it", audit.stdout) and "the log is unchanged" in audit.stdout
    audit_file().write_bytes(audit_file().read_bytes().replace(b"Bob", b"Eve"))
    assert models("audit", "--verify").exit_code == 1
    assert models("promote", "celestial/2").exit_code == 2
    assert models("audit", "--restart", "--who", "Ada").exit_code == 0
    assert models("audit", "--verify").exit_code == 0 and champion().model == "celestial/1"


def test_an_unknown_name_gets_the_nearest_one(home: Path, run: Run, models: Models, tmp_path: Path) -> None:
    assert "nothing is registered" in models("show", "celestial/1").stderr
    register_version(package(tmp_path / "a"), "celestial", run)
    wrong = models("promote", "celestal/1")
    assert wrong.exit_code == 2 and "did you mean 'celestial/1'?" in wrong.stderr
    assert "there is no champion" in models("compare", "celestial/1", "champion").stderr
    assert models("promote", "celestial/1", "--params", "nowhere").exit_code == 2
