"Versions of the data: a folder and a real S3-speaking server as remotes, remotes that are away, halves, kill -9, and the diff."

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from programs import chromium, forget_connections, git, s3_store
from typer.testing import CliRunner

from celestial_ml.cli.versions import versions_app
from celestial_ml.core.errors import CelestialError
from celestial_ml.data.guide import dvc_checksum
from celestial_ml.data.versions import data_diff, pull, push, record

IMAGES = "data/labelled"


def paint(folder: Path, label: str, number: int) -> Path:
    "A picture, which no other one equals."
    path = folder / label / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (number % 256, number // 256, len(label))).save(path)
    return path


def make_versioned(folder: Path, count: int = 12) -> Path:
    "A project in git and DVC, with some pictures of two classes in one commit."
    for number in range(count):
        paint(folder / IMAGES, ("Mars", "Venus")[number % 2], number)
    (folder / "pipeline.yaml").write_text("")  # what makes a folder a project
    git(folder, "init", "-q")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    record(folder, IMAGES)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "some pictures")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_versioned(tmp_path_factory.mktemp("made"))


@pytest.fixture
def versioned(made: Path, tmp_path: Path) -> Path:
    "A copy of a project, which takes seconds to make."
    return Path(shutil.copytree(made, tmp_path / "project"))


def clone(project: Path, name: str = "clone") -> Path:
    git(project.parent, "clone", "-q", str(project), name)
    return project.parent / name


@contextmanager
def s3_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen]:
    "A store that speaks S3; this process has its keys in the environment."
    with s3_store(folder, "bucket") as (server, settings):
        for name, value in (settings | {"AWS_MAX_ATTEMPTS": "1"}).items():
            monkeypatch.setenv(name, value)
        forget_connections()
        yield server


def refusal(function: Callable[..., Any], *arguments: Any) -> CelestialError:
    "The error that a call ends in, which holds no secret."
    with pytest.raises(CelestialError) as failure:
        function(*arguments)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ.get(name, "no key") not in str(failure.value)
    assert failure.value.exit_code == 2 and failure.value.hint
    return failure.value


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_folder_as_remote(versioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Pushed from one place, pulled at another, through the commands; a command that is given twice does nothing."
    store = tmp_path / "store"
    assert "mkdir -p" in refusal(push, versioned, str(store)).hint and not store.exists()
    monkeypatch.chdir(versioned)
    assert CliRunner().invoke(versions_app, ["push", "--remote", str(store)]).exit_code == 2, "a remote that is away"
    store.mkdir()
    paint(versioned / IMAGES, "Mars", 700)
    result = CliRunner().invoke(versions_app, ["push", "--remote", str(store)])
    assert result.exit_code == 0, result.output
    assert f"recorded: {IMAGES}" in result.output and f"git add {IMAGES}.dvc" in result.output
    git(versioned, "commit", "-qam", "one more")
    other = clone(versioned)
    monkeypatch.chdir(other)
    result = CliRunner().invoke(versions_app, ["pull", "--remote", str(store), "--json"])
    assert result.exit_code == 0 and json.loads(result.output)["files"] == 14, "13 pictures and their listing"
    assert dvc_checksum(other / IMAGES) == dvc_checksum(versioned / IMAGES)
    assert push(versioned, str(store)).files == pull(other, str(store)).files == 0


def test_a_store_that_speaks_s3(versioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Push, pull, a wrong key, a bucket that isn't there and a server that is away; no key is written anywhere."
    url, other, written = "s3://bucket/planets", clone(versioned), StringIO()
    with s3_server(tmp_path / "served", monkeypatch) as server, redirect_stderr(written), redirect_stdout(written):
        subprocess.run([sys.executable, "-m", "dvc", "remote", "add", "-dq", "store", url], cwd=versioned, check=True)
        assert push(versioned).files == 13 and push(versioned).files == 0
        assert pull(other, url).files == 13 and dvc_checksum(other / IMAGES) == dvc_checksum(versioned / IMAGES)
        assert "bucket" in refusal(push, versioned, "s3://no-such-bucket/planets").message
        assert "holds nothing" in refusal(pull, clone(versioned, "third"), "s3://bucket/elsewhere").message
        key = os.environ["AWS_SECRET_ACCESS_KEY"]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        forget_connections()
        assert "AWS_SECRET_ACCESS_KEY" in refusal(push, versioned, "s3://bucket/planets").hint
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key)
        forget_connections()
        server.kill()
        server.wait()
        paint(versioned / IMAGES, "Mars", 701)
        pointer = (versioned / f"{IMAGES}.dvc").read_bytes()
        begun = time.monotonic()
        for call in (lambda: push(versioned), lambda: pull(tmp_path / "third", url)):
            assert "can't be reached" in refusal(call).message
        assert time.monotonic() - begun < 180
        assert (versioned / f"{IMAGES}.dvc").read_bytes() == pointer, "a remote that is away changes nothing"
        assert not (tmp_path / "third" / IMAGES).exists()
        for place in (versioned, other):
            for path in files(place):
                assert key.encode() not in path.read_bytes(), path
    assert key not in written.getvalue()


def test_a_key_in_a_file_of_git_stops_everything(versioned: Path, tmp_path: Path) -> None:
    config = versioned / ".dvc/config"
    config.write_text(
        '[core]\n    remote = store\n["remote \\"store\\""]\n    url = s3://bucket\n    secret_access_key = hush-hush\n'
    )
    for function in (push, pull):
        error = refusal(function, versioned)
        assert "line 5" in error.message and "hush-hush" not in str(error)
    config.write_text("")
    error = refusal(push, versioned, "https://anna:hush-hush@example.org/store")
    assert "hush-hush" not in str(error)


def test_a_push_by_halves_is_not_pulled(versioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "What a push copies last is the listing; without it, or without a picture, nothing appears."
    (store := tmp_path / "store").mkdir()
    push(versioned, str(store))
    other, kept = clone(versioned), tmp_path / "kept"
    listing = next(path for path in files(store) if path.suffix == ".dir")
    picture = next(path for path in files(store) if path.suffix != ".dir")
    for path in (listing, picture):
        shutil.move(path, kept)
        shutil.rmtree(other / ".dvc/cache", ignore_errors=True)
        shutil.rmtree(other / ".dvc/tmp", ignore_errors=True)
        error = refusal(pull, other, str(store))
        assert "celestial data push" in error.hint and not (other / IMAGES).exists()
        monkeypatch.chdir(other)
        result = CliRunner().invoke(versions_app, ["pull", "--remote", str(store)])
        assert result.exit_code == 2 and "celestial data push" in result.output and not (other / IMAGES).exists()
        shutil.move(kept, path)
    picture.unlink()  # and finished by the same command, even where DVC believes that all is there
    listing.unlink()
    assert push(versioned, str(store)).files == 2
    pull(other, str(store))
    assert dvc_checksum(other / IMAGES) == dvc_checksum(versioned / IMAGES)


def test_pictures_that_are_gone(versioned: Path, tmp_path: Path) -> None:
    "Gone here: fetched again. Gone everywhere: an error, and neither side changes. All of them: not taken for a version."
    (store := tmp_path / "store").mkdir()
    push(versioned, str(store))
    checksum = dvc_checksum(versioned / IMAGES)
    for path in files(versioned / IMAGES)[:3]:
        path.unlink()
    pull(versioned, str(store))
    assert dvc_checksum(versioned / IMAGES) == checksum
    for path in files(versioned / IMAGES):
        path.unlink()
    assert f"celestial data pull {IMAGES}" in refusal(push, versioned, str(store)).hint
    (empty := tmp_path / "empty").mkdir()
    for path in files(versioned / ".dvc/cache")[:3]:
        path.chmod(0o644)
        path.unlink()
    shutil.rmtree(versioned / IMAGES)
    assert "neither here nor on the remote" in refusal(push, versioned, str(empty)).message
    assert not files(empty)


def test_what_is_in_no_version_is_not_overwritten(versioned: Path, tmp_path: Path) -> None:
    (store := tmp_path / "store").mkdir()
    push(versioned, str(store))
    other = clone(versioned)
    pull(other, str(store))
    paint(versioned / IMAGES, "Mars", 702)
    push(versioned, str(store))
    git(versioned, "commit", "-qam", "one more")
    mine = paint(other / IMAGES, "Venus", 703)
    git(other, "pull", "-q")
    assert "Venus/703.png" in refusal(pull, other, str(store)).message and mine.exists()
    mine.rename(tmp_path / "mine.png")
    pull(other, str(store))
    assert (other / IMAGES / "Mars/702.png").exists()


def test_bad_requests(versioned: Path, tmp_path: Path) -> None:
    (versioned / f"{IMAGES}.dvc").write_text("outs:\n- md5: [\n")  # a merge, or a full disk
    for function in (push, pull):
        refusal(function, versioned)
    refusal(data_diff, versioned, "HEAD")
    git(versioned, "checkout", "-q", "--", f"{IMAGES}.dvc")
    refusal(data_diff, versioned, "no-such-revision")
    refusal(pull, versioned, None, ["data/labeled"])
    subprocess.run([sys.executable, "-m", "dvc", "remove", "-q", f"{IMAGES}.dvc"], cwd=versioned, check=True)
    shutil.rmtree(versioned / IMAGES)
    assert "first accepted label" in refusal(push, versioned, str(tmp_path), [IMAGES]).message
    (bare := tmp_path / "bare").mkdir()
    for function in (push, pull):
        refusal(function, bare)
    refusal(data_diff, bare, "HEAD")


def killed(function: Callable[..., Any], *arguments: Any, after: float) -> bool:
    "Call a function in a process of its own and kill that after some seconds; whether it had ended by then."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dvc.repo", "celestial_ml.data.versions", "dvc_s3"])
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(after)
    ended = not process.is_alive()
    process.kill()
    process.join()
    return ended


@pytest.mark.parametrize("moments", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_loses_nothing(tmp_path: Path, moments: int) -> None:
    "Pushes and pulls are killed at many moments: the folder is never there by halves, and the same command finishes."
    (project := tmp_path / "project").mkdir()
    (store := tmp_path / "store").mkdir()
    make_versioned(project, 100 if moments > 2 else 40)
    chance, longest = random.Random(0), 1.0
    push(project, str(store))
    pull(other := clone(project), str(store))
    ended = {"push": 0, "pull": 0}
    for moment in range(moments):
        before = dvc_checksum(other / IMAGES)
        for number in range(40):
            paint(project / IMAGES, "Moon", 1000 + 40 * moment + number)
        now = dvc_checksum(project / IMAGES)
        ended["push"] += killed(push, project, str(store), after=chance.uniform(0.05, longest))
        assert dvc_checksum(project / IMAGES) == now, "the pictures themselves are not touched"
        push(project, str(store))
        git(project, "commit", "-qam", "more")
        git(other, "pull", "-q")
        ended["pull"] += killed(pull, other, str(store), after=chance.uniform(0.05, longest))
        assert not (other / IMAGES).exists() or dvc_checksum(other / IMAGES) in (before, now), "by halves"
        pull(other, str(store))
        assert dvc_checksum(other / IMAGES) == now
        assert not [path for path in (other / "data").iterdir() if path.name.endswith(".part")]
    print(ended)
    assert sum(ended.values()) < 2 * moments, "some were killed while at it"


def test_diff_in_text_json_and_a_page(versioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Every kind of change is named, and its pictures are on the page; what is under another label is no other picture."
    folder = versioned / IMAGES
    (folder / "Mars/0.png").rename(folder / "Venus/0-was-mars.png")
    (folder / "Mars/2.png").rename(folder / "Mars/2-moved.png")
    (folder / "Venus/1.png").unlink()
    paint(folder, "Neptune", 800)
    shutil.copy(paint(folder, "Moon", 801), folder / "Venus/3.png")
    monkeypatch.chdir(versioned)
    result = CliRunner().invoke(versions_app, ["diff", "HEAD", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert {kind: answer[kind] for kind in ("added", "removed", "relabelled", "changed")} == {
        "added": 2, "removed": 1, "relabelled": 1, "changed": 1,
    }  # fmt: skip
    relabelled = next(one for one in answer["changes"] if one["kind"] == "relabelled")
    assert (relabelled["before"], relabelled["label"]) == ("Mars", "Venus")
    assert not (versioned / "output").exists()
    result = CliRunner().invoke(versions_app, ["diff", "HEAD"])
    assert result.exit_code == 0 and "Mars → Venus" in result.output and "None" not in result.output
    assert "output/data_diff.html" in result.output
    page = (versioned / "output/data_diff.html").read_text()
    assert page.count("data:image/webp") == 6, "two for the one that changed"


@pytest.mark.browser
def test_the_page_of_a_diff_can_be_read(versioned: Path, tmp_path: Path) -> None:
    from celestial_ml.data.versions import diff_page

    paint(versioned / IMAGES, "Neptune", 800)
    (tmp_path / "diff.html").write_text(diff_page(data_diff(versioned, "HEAD", pixels=160), "HEAD").html())
    with chromium() as browser:
        page = browser.new_page()
        page.goto((tmp_path / "diff.html").as_uri())
        assert page.locator("figure img").count() == 1
        assert page.locator("figure img").evaluate("one => one.naturalWidth") == 24


def test_pictures_of_an_earlier_version_come_from_the_remote(versioned: Path, tmp_path: Path) -> None:
    "A fresh clone shows what was removed: its picture is on the remote alone. Without a remote, that is an error."
    (store := tmp_path / "store").mkdir()
    push(versioned, str(store))
    (versioned / IMAGES / "Mars/0.png").unlink()
    push(versioned, str(store))
    git(versioned, "commit", "-qam", "one less")
    other = clone(versioned)
    assert "celestial data pull" in refusal(data_diff, other, "HEAD~1").hint, "nothing is here yet"
    pull(other, str(store))
    assert "neither here nor on the remote" in refusal(data_diff, other, "HEAD~1").message
    diff = data_diff(other, "HEAD~1", remote=str(store), pixels=24)
    assert diff.counts["removed"] == 1 and diff.thumbnails[diff.changes[0]][0].shape == (24, 24, 3)
