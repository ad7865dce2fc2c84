"""Folders that move, disks that are full, names that are too long, two commands at once, terminals of any encoding"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from celestial_ml.core.errors import CelestialError, refused_by_machine
from celestial_ml.core.files import atomic, hold, write_json

ROOT = Path(__file__).resolve().parent.parent
COMMAND = str(Path(sys.executable).with_name("celestial"))


def python(code: str, home: Path, encoding: str = "utf-8", **extra: str) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_"))}
    env |= {"CELESTIAL_HOME": str(home), "PYTHONPATH": str(ROOT)} | extra
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        encoding=encoding,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


TRACK = """
import os, sys
from pathlib import Path
from celestial_ml.core.files import home
from celestial_ml.core.params import Track
from celestial_ml.registry.tracking import resume_run, start_run
"""
RECORD = f"""{TRACK}
with start_run(Track(experiment="é a/b"), "one") as run:
    note = home() / "note.txt"
    note.write_text("seen")
    run.log_file(note, "notes")
    client = run.client
    if not client.search_registered_models():
        client.create_registered_model("m")
    client.create_model_version("m", f"{{client.get_run(run.id).info.artifact_uri}}/notes", run.id)
print(run.id)
"""


def recorded(home: Path) -> tuple[str, str]:
    "The id of a run that another process records, and what it says meanwhile."
    with python(RECORD, home) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["copied", pytest.param("moved", marks=pytest.mark.slow)])
def test_a_folder_that_moved_takes_its_artifacts_along(tmp_path: Path, how: str) -> None:
    first, second = tmp_path / "a home", tmp_path / "b #%"
    old, _ = recorded(first)
    shutil.copytree(first, second)
    if how == "moved":
        shutil.rmtree(first)
    before = snapshot(first)
    new, words = recorded(second)
    assert snapshot(first) == before and first.exists() == (how == "copied")
    assert len([line for line in words.splitlines() if str(first) in line]) == 1
    assert [path.name for path in second.rglob(f"{new}/artifacts/notes/*")] == ["note.txt"]
    code = f"""{TRACK}
client = resume_run(Track(), {old!r}).client
print(client.list_artifacts({old!r}, "notes")[0].path, Path(client.download_artifacts({old!r}, "notes/note.txt")).read_text())
for version in client.search_model_versions("name = 'm'"):
    print(client.get_model_version_download_uri("m", version.version))
"""
    with python(code, second) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[0] == "notes/note.txt seen" and str(first) not in err
    assert len(out.splitlines()) == 3 and all(line.startswith(second.as_uri()) for line in out.splitlines()[1:])


@pytest.mark.slow
def test_another_database_is_not_touched(tmp_path: Path) -> None:
    from celestial_ml.core.params import Track
    from celestial_ml.registry.tracking import tracking_uri

    uri = f"sqlite:///{tmp_path}/elsewhere.db"
    code = f"{TRACK}\nwith start_run(Track(uri={uri!r}), 'one') as run: print(run.client.get_run(run.id).info.artifact_uri)"
    places = []
    for home in ("a", "b"):
        with python(code, tmp_path / home) as process:
            places.append(process.communicate(timeout=120)[0].strip())
    assert tracking_uri(Track(uri=uri)) == uri
    assert all(place.startswith((tmp_path / "a").as_uri()) for place in places), "set by who made it, and left so"


def test_first_runs_at_once_share_one_database(tmp_path: Path) -> None:
    code = f"{TRACK}\nwith start_run(Track(), 'one') as run: print(run.id)"
    processes = [python(code, tmp_path / "home") for _ in range(2)]
    results = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    assert [code for *_, code in results] == [0] * 2, results
    assert len({out for out, *_ in results}) == 2
    assert not list((tmp_path / "home").glob("*.part*"))


# -- locks


HOLDER = """
import sys, time
from pathlib import Path
from celestial_ml.core.files import hold
with hold(Path(sys.argv[1]), "the run x is being done already", "Wait."):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_error_names_who_holds_a_lock_and_a_dead_process_holds_none(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / ".lock"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], env=env, text=True, stdout=subprocess.PIPE) as first:
        assert first.stdout and first.stdout.readline() == "held\n"
        with pytest.raises(CelestialError) as e, hold(lock, "the run x is being done already", "Wait."):
            pass
        assert str(first.pid) in e.value.message and os.uname().nodename in e.value.message and e.value.exit_code == 2
        first.send_signal(signal.SIGKILL)
    with hold(lock, "-", "-"):
        assert json.loads(lock.with_name(".lock.owner").read_text())["pid"] == os.getpid()
        with pytest.raises(CelestialError), hold(lock, "-", "-"):
            pass
    assert [path.name for path in lock.parent.iterdir()] in ([".lock"], [])


def test_a_run_that_is_running_is_refused_and_its_process_named(project: Path, celestial: Callable) -> None:
    with hold(project / "output/busy/.lock", "-", "-"):
        for arguments in (["run", "smoke", "--run", "busy"], ["run", "smoke", "--run", "busy", "--force"]):
            result = celestial(*arguments)
            assert result.returncode == 2 and f"process {os.getpid()} on" in result.stderr, result.stderr
            assert "Traceback" not in result.stderr and "busy" in result.stderr
        swept = celestial("sweep", "smoke", "--run", "busy", "--grid", "seed=1")
        assert swept.returncode == 2 and f"process {os.getpid()} on" in swept.stderr
    assert sorted(path.name for path in (project / "output/busy").iterdir() if "lock" not in path.name) in (
        [],
        ["index.html"],
    )


# -- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    "A disk of one megabyte; skipped where nobody may mount one."
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def refusal_of(do: Callable[[], object]) -> CelestialError:
    with pytest.raises(Exception) as raised:
        do()
    refusal = refused_by_machine(raised.value)
    assert refusal and refusal.exit_code == 2 and refusal.hint, repr(raised.value)
    return refusal


def test_a_full_disk_is_named_and_nothing_half_written_stays(small_disk: Path) -> None:
    import numpy as np
    import pandas as pd

    write_json(small_disk / "a.json", {"kept": True})

    def write(how: Callable[[Path], object]) -> Callable[[], None]:
        def do() -> None:
            with atomic(small_disk / "a.json") as f:
                how(f)

        return do

    table = pd.DataFrame(np.random.default_rng(1).random((60_000, 4)), columns=list("abcd"))
    ways: list[Callable[[Path], object]] = [lambda f: f.write_bytes(bytes(3_000_000)), table.to_parquet, table.to_csv]

    def save(f: Path) -> None:
        with f.open("wb") as file:
            np.save(file, table.to_numpy())

    ways.append(save)
    for way in ways:
        refusal = refusal_of(write(way))
        assert "a.json" in refusal.message and ".part" not in refusal.message
        assert [path.name for path in small_disk.iterdir()] == ["a.json"]
    assert json.loads((small_disk / "a.json").read_text()) == {"kept": True}
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "a.json" in refusal_of(lambda: write_json(small_disk / "a.json", 1)).message
    assert "only be read" in refusal_of(lambda: write_json(small_disk / "deep/a.json", 1)).message


def test_names_and_places_that_no_system_takes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / ("n" * 300),
        tmp_path / "file" / "a.json",
        tmp_path / "file/deep/a.json",
        Path("/proc/a.json"),
    ):
        refusal = refusal_of(lambda path=path: write_json(path, 1))  # type: ignore[misc]
        assert str(path.parent if "file" in str(path) else path)[:40] in refusal.message


def test_disk_errors_are_recognised_by_their_message() -> None:
    assert refused_by_machine("OSError: [Errno 28] No space left on device").exit_code == 2  # type: ignore[union-attr]
    words = "PermissionError: [Errno 13] Permission denied: '/srv/x'"
    assert "/srv/x" in refused_by_machine(words).message  # type: ignore[union-attr]
    wrapped = RuntimeError("a step failed")
    wrapped.__cause__ = OSError(errno.EROFS, "Read-only file system", "/srv/y")
    assert "/srv/y" in refused_by_machine(wrapped).message  # type: ignore[union-attr]
    assert refused_by_machine(KeyError("x")) is None


def test_commands_report_a_full_disk(project: Path, celestial: Callable, small_disk: Path) -> None:
    (small_disk / "fill").write_bytes(bytes(900_000))
    for name in ("output", ".celestial"):
        shutil.rmtree(project / name, ignore_errors=True)
        (project / name).symlink_to(small_disk, target_is_directory=True)
    try:
        result = celestial("run", "smoke")
        assert result.returncode == 2, result.stderr[-3000:]
        assert "error: " in result.stderr and "full" in result.stderr and "Traceback" not in result.stderr
        assert not list(small_disk.rglob("*.part*"))
    finally:
        for name in ("output", ".celestial"):
            (project / name).unlink()


def test_commands_report_a_name_that_is_too_long(project: Path, celestial: Callable) -> None:
    (project / "file").write_text("")
    (project / "images/Mars").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(project / "images/Mars/1.png")
    for arguments in (
        ["run", "smoke", "--run", "n" * 300],
        ["data", "show", "images", "--output", "file/sheet.png"],
        ["new", "n" * 300],
        ["sweep", "smoke", "--run", "n" * 300, "--grid", "seed=1"],
        ["report", "n" * 300],
    ):
        result = celestial(*arguments)
        assert result.returncode == 2, (arguments, result.stdout, result.stderr[-2000:])
        assert "error: " in result.stderr and "Traceback" not in result.stderr


# -- outputs


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "cp1252")]


@pytest.mark.parametrize("encoding", ["ascii", *SLOW])
def test_every_terminal_encoding_shows_every_character(project: Path, celestial: Callable, encoding: str) -> None:
    images = project / "images"
    for name in ("Ångström", "Mars"):  # of each a picture: too few
        (images / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "red").save(images / name / "✓.png")
    code = "from celestial_ml.cli.app import _in_utf8; _in_utf8(); print(chr(10003), chr(215), chr(0xdce9)); import os;"
    code += "open(os.devnull, 'w').write(chr(10003))"
    for extra in ({"PYTHONIOENCODING": encoding}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        process = python(code, project / ".celestial", encoding, **extra)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err, err
        shown = celestial("data", "check", images, "--json", **extra)
        assert shown.returncode == 1 and "Ångström" in str(json.loads(shown.stdout)), shown.stderr


def test_an_output_that_is_closed_or_full_ends_without_a_traceback(project: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(project), "CELESTIAL_HOME": str(project / ".celestial")}
    cut = subprocess.Popen(
        [COMMAND, "params", "train"], cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert cut.stdout and cut.stderr
    cut.stdout.close()
    assert cut.wait(60) == 141 and cut.stderr.read() == b""
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [COMMAND, "params", "train"], cwd=project, env=env, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert result.returncode == 2 and b"output" in result.stderr and b"Traceback" not in result.stderr


def test_closed_standard_streams_end_without_a_traceback(project: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(project), "CELESTIAL_HOME": str(project / ".celestial")}
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        command = ["/bin/sh", "-c", f"exec {COMMAND} params train {closed}"]
        result = subprocess.run(command, cwd=project, env=env, capture_output=True, timeout=60)
        assert result.returncode == 0 and not result.stderr, (closed, result.stderr)


def test_ctrl_c_leaves_with_130(project: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(project), "CELESTIAL_HOME": str(project / ".celestial")}
    command = [COMMAND, "run", "smoke", "--run", "stopped"]
    process = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert not (project / "output/stopped/.lock.owner").exists()


def test_our_own_files_name_their_encoding() -> None:
    command = [str(Path(sys.executable).with_name("ruff")), "check", "--preview", "--select", "PLW1514", "celestial_ml"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


# -- a step that papermill runs on its own


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "per_clas", "5"], "did you mean per_class?"),
        (["-y", "val: 1e-1"], "data.val can't be '1e-1'"),
        pytest.param(["-r", "seed", "x"], "seed can't be 'x'", marks=pytest.mark.slow),
        pytest.param(["-p", "per_class", "0"], "data.per_class can't be 0", marks=pytest.mark.slow),
    ],
)
def test_a_step_refuses_parameters_that_it_does_not_have(project: Path, arguments: list[str], words: str) -> None:
    env = os.environ | {"PYTHONPATH": str(project), "CELESTIAL_HOME": str(project / ".celestial")}
    command = [str(Path(sys.executable).with_name("papermill")), "nbs/steps/01_acquire.ipynb", "out.ipynb", *arguments]
    result = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode and "ParamsError: the parameters of acquire: " in result.stderr
    assert words in result.stderr and not (project / "output/default/catalog.parquet").exists()


# -- what a transient fault leaves


def test_a_model_is_loaded_once_a_fault_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from celestial_ml.core.testing import colour_model
    from celestial_ml.serve.live_models import Models
    from celestial_ml.serve.service_metrics import ServiceMetrics

    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path))
    folder = tmp_path / "models/tiny/1"
    colour_model(folder)
    write_json(tmp_path / "models/champion.json", {"model": "tiny/1"})
    metrics = ServiceMetrics()

    def figure(models: Models) -> str:
        return next(line for line in metrics.page().decode().splitlines() if 'refused{role="champion"}' in line)

    models = Models(metrics)
    assert models.now() and models.champion.refused is None

    # The pointer can't be read, as when all descriptors are in use: the same model is no longer refused afterwards.
    pointer = (tmp_path / "models/champion.json").read_bytes()
    (tmp_path / "models/champion.json").unlink()
    (tmp_path / "models/champion.json").mkdir()
    models.refresh()
    assert models.champion.refused and figure(models).endswith(" 1.0")
    assert str(tmp_path) not in str(models.champion.reason)
    (tmp_path / "models/champion.json").rmdir()
    (tmp_path / "models/champion.json").write_bytes(pointer)
    models.refresh()
    assert models.now() and models.champion.refused is None and figure(models).endswith(" 0.0")

    # The model is short for a moment, at the start: it is taken up once it is whole, though folder and name are the same.
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[:100])
    late = Models(ServiceMetrics())
    assert late.now() is None and late.champion.refused
    (folder / "model.onnx").write_bytes(whole)
    late.refresh()
    assert late.now() and late.champion.refused is None

    # A fault that changes no file is looked at again, later and later.
    now = [0.0]
    late.champion.backoff.clock = lambda: now[0]
    loads = []
    monkeypatch.setattr(late.champion, "take", lambda folder: loads.append(now[0]) or 1 / 0)
    os.utime(folder / "model.json", ns=(1, 1))
    for second in range(300):
        now[0] = float(second)
        late.refresh()
    assert loads == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]


# -- batch and predict


def test_batch_and_predict_report_a_place_that_cannot_be_written(tmp_path: Path, small_disk: Path) -> None:
    from serving import encoded, tiny_model

    from celestial_ml.planets.renderer import render

    model, photos = tiny_model(tmp_path / "model"), tmp_path / "photos"
    photos.mkdir()
    for i in range(600):
        (photos / f"{i:03}.jpg").write_bytes(encoded(render("Mars", size=32)[i % 16 :], "JPEG"))
    (small_disk / "out").mkdir()
    with pytest.raises(OSError), (small_disk / "fill").open("wb", buffering=0) as fill:
        while True:
            fill.write(bytes(4096))
    (tmp_path / "file").write_text("")
    env = os.environ | {"PYTHONPATH": str(ROOT), "CELESTIAL_HOME": str(tmp_path / "home")}

    def command(*arguments: object, **options: object) -> subprocess.CompletedProcess:
        command = [COMMAND, *map(str, arguments), "--model", str(model)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            **{"stdout": subprocess.PIPE} | options,
        )  # type: ignore[call-overload]

    for out in (
        small_disk / "out",
        small_disk / "out.parquet",
        tmp_path / "file/out",
        tmp_path / ("n" * 300),
        "/proc/out",
    ):
        result = command("batch", photos, out)
        assert result.returncode == 2, (out, result.stdout, result.stderr[-2000:])
        assert "error: " in result.stderr and "Traceback" not in result.stderr, result.stderr
        named = str(out)[:60] if out != tmp_path / "file/out" else str(tmp_path / "file")
        assert named in result.stderr, result.stderr
    os.truncate(small_disk / "fill", (small_disk / "fill").stat().st_size - 16_384)  # room for notes, not for answers
    result = command("batch", photos, small_disk / "more")
    assert result.returncode == 2 and "full" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not [path for path in small_disk.rglob("*.part*") if path.is_file()]
    with Path("/dev/full").open("w") as full:
        result = command("predict", photos / "000.jpg", stdout=full)
    assert result.returncode == 2 and "output" in result.stderr and "Traceback" not in result.stderr


# -- what was damaged


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe{", b"[" * 99_999])
def test_a_damaged_pointer_is_named_and_restored_from_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    from celestial_ml.package.published import find_model
    from celestial_ml.registry.audit import append, verify
    from celestial_ml.registry.state import champion, recover

    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path))
    monkeypatch.delenv("CELESTIAL_MODEL", raising=False)
    entry = append("promote", "tiny/1", "promoted", {})
    pointer = tmp_path / "models/champion.json"
    write_json(pointer, {"model": "tiny/1", "entry": entry["sha256"]})
    whole = pointer.read_bytes()
    pointer.write_bytes(content)
    for ask in (find_model, champion):
        with pytest.raises(CelestialError) as e:
            ask()
        assert str(pointer) in e.value.message and e.value.exit_code == 2 and e.value.hint
    assert not verify().problems and recover().champion == "tiny/1"
    assert pointer.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_a_damaged_database_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    from celestial_ml.core.params import Track
    from celestial_ml.registry.tracking import mlflow_client

    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(CelestialError) as e:
        mlflow_client(Track())
    assert str(tmp_path / "mlflow.db") in e.value.message and e.value.exit_code == 2
    assert (tmp_path / "mlflow.db").read_bytes() == content


def test_a_version_whose_file_is_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from celestial_ml.registry.versions import read_version

    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path))
    (tmp_path / "models/tiny/1/model.json").mkdir(parents=True)
    with pytest.raises(CelestialError, match=r"tiny/1/model\.json is not a file"):
        read_version("tiny/1")


def test_a_lock_needs_no_disk_space(small_disk: Path) -> None:
    (small_disk / ".lock").touch()
    with pytest.raises(OSError, match="No space"):
        (small_disk / "fill").write_bytes(bytes(2_000_000))
    with hold(small_disk / ".lock", "-", "-"), pytest.raises(CelestialError), hold(small_disk / ".lock", "-", "-"):
        pass


def test_a_step_on_its_own_is_refused_while_its_run_is_running(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from celestial_ml.flow.steps import open_step

    monkeypatch.chdir(project)
    with hold(project / "output/held/.lock", "-", "-"):
        with pytest.raises(CelestialError) as e:
            open_step("acquire", {"run": "held"})
        assert f"process {os.getpid()}" in e.value.message
        assert open_step("acquire", {"run": "held", "product": {"catalog": "output/held/catalog.parquet"}}), (
            "the run's own step"
        )
    assert open_step("acquire", {"run": "held"}) and open_step("acquire", {"run": "held"})


def test_a_deleted_current_folder_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f'rmdir "$PWD"; exec {COMMAND} predict a.jpg'
    env = {name: value for name, value in os.environ.items() if not name.startswith("CELESTIAL_")}
    result = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=tmp_path / "gone",
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
