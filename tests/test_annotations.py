"""Labels of other tools: what is wrong with a file, a process that is killed, and a team's Label Studio.

`CELESTIAL_LABEL_STUDIO=FOLDER pytest -m label_studio` runs the tests with a real Label Studio, whose virtual environment
FOLDER is: `python -m venv FOLDER; FOLDER/bin/pip install label-studio==1.23.2`.
"""

import io
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from programs import free_port
from serving import running, tiny_model, until
from typer.testing import CliRunner

from celestial_ml.cli.label import label_app
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import sha256_of
from celestial_ml.label.imports import import_labels
from celestial_ml.label.label_studio import KEY, label_config
from celestial_ml.label.store import Judgement, label_database, propose, read_judgements, review
from celestial_ml.planets.renderer import render

MAIN = "import sys; sys.argv[0] = 'celestial'; {}; from celestial_ml.cli.app import main; main()"
TOKEN = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path / "home"))


def pictures(folder: Path, count: int) -> list[str]:
    "Small pictures, each another one."
    folder.mkdir(parents=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (16, 16), (number % 256, number // 256, 99)).save(folder / name)
    return names


def cvat(names: list[str], label: str = "Mars") -> str:
    "A file as CVAT writes it."
    images = "".join(f'<image id="{i}" name="{n}"><tag label="{label}"/></image>' for i, n in enumerate(names))
    return f"<annotations><version>1.1</version>{images}</annotations>"


def celestial(*words: str, before: str = "pass", **env: str) -> subprocess.CompletedProcess[str]:
    "The command, to its end."
    code = [sys.executable, "-c", MAIN.format(before), *words]
    return subprocess.run(code, env=os.environ | env, capture_output=True, text=True, timeout=300)


# A process that is killed


@pytest.mark.slow
def test_a_killed_import_leaves_all_or_nothing(tmp_path: Path) -> None:
    "At 50 moments of an import of 1,500 pictures; the same command again brings all of them."
    names = pictures(tmp_path / "in", 1500)
    (tmp_path / "in/annotations.xml").write_text(cvat(names))
    code = f"""
import os, signal, sys, threading, time
from celestial_ml.label.imports import import_labels
from celestial_ml.label.store import open_labels
with open_labels():
    pass
threading.Timer(float(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
began = time.perf_counter()
import_labels({str(tmp_path / "in")!r}, otherwise="anna")
print(time.perf_counter() - began, flush=True)
os._exit(0)
"""
    took = float(subprocess.run([sys.executable, "-c", code, "600"], capture_output=True, text=True, check=True).stdout)
    database = label_database().file
    assert database is not None and len(read_judgements()) == 1500
    states = []
    for moment in [random.Random(moment).uniform(0, 1.1 * took) for moment in range(50)]:
        for path in database.parent.glob("labels.db*"):
            path.unlink()
        subprocess.run([sys.executable, "-c", code, str(moment)], capture_output=True)
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            states.append(
                tuple(connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("judgements", "pictures"))
            )
    assert set(states) <= {(0, 0), (1500, 1500)} and (0, 0) in states, states
    assert import_labels(tmp_path / "in", otherwise="anna")["labels"] == 1500 == len(read_judgements())


# What is wrong with a file


BAD = {
    "gone": cvat(["none.png"]),
    "nameless": cvat([""]),
    "boxes": cvat(["0.png"]).replace("<tag ", "<box "),
    "typing error": cvat(["0.png"], "Marss"),
    "path": cvat(["../../../etc/passwd"]),
    "absolute": cvat(["/etc/passwd"]),
    "class as a path": cvat(["0.png"], "../../Mars"),
    "laughs": '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]>' + cvat(["0.png"], "&c;"),
    "external": '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>' + cvat(["0.png"], "&b;"),
    "cut off": cvat(["0.png"])[:-9],
    "deep": "<annotations>" + "<a>" * 5000,
    "empty": "",
    "several": cvat(["0.png"]).replace("</image>", '<tag label="Moon"/></image>'),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_answered_and_nothing_stored(kind: str, tmp_path: Path) -> None:
    "Of a file with one good picture and a bad one, too; as XML, and in a ZIP."
    names = pictures(tmp_path / "in", 2)
    known = (tmp_path / "in/1.png").read_bytes()
    propose([Judgement(sha256_of(known), "Mars", "anna", "page")], {sha256_of(known): known})
    review({sha256_of(known): "Mars"}, "rosa")
    (tmp_path / "a.xml").write_text(BAD[kind])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("annotations.xml", BAD[kind].replace("</annotations>", cvat(names[1:])[42:]))
        for name in names:
            archive.write(tmp_path / "in" / name, f"images/{name}")
    before = read_judgements()
    for words in ([str(tmp_path / "a.xml"), "--images", str(tmp_path / "in")], [str(tmp_path / "a.zip")]):
        result = CliRunner().invoke(label_app, ["import", *words])
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert read_judgements() == before


def via3(tag: dict[str, str], xy: list[float]) -> str:
    "A project as VIA 3 saves it."
    kind = {"aname": "body", "type": 4, "desc": "", "options": {"0": "Mars", "1": "Marss"}, "default_option_id": ""}
    file = {"fid": "1", "fname": "0.png", "type": 2, "loc": 1, "src": ""}
    return json.dumps({
        "project": {"pid": "__VIA_PROJECT_ID__", "rev": "__VIA_PROJECT_REV_ID__", "created": 1, "vid_list": ["1"]},
        "config": {"file": {"loc_prefix": {"1": "", "2": "", "3": "", "4": ""}}, "ui": {}},
        "attribute": {"1": kind | {"anchor_id": "FILE1_Z0_XY1" if xy else "FILE1_Z0_XY0"}},
        "file": {"1": file}, "metadata": {"1_Ab": {"vid": "1", "flg": 0, "z": [], "xy": xy, "av": tag}},
        "view": {"1": {"fid_list": ["1"]}},
    })  # fmt: skip


def test_via_3(tmp_path: Path) -> None:
    "The option's text is the label; a region is none, unless boxes are wanted."
    pictures(tmp_path / "in", 1)
    file = tmp_path / "in/via.json"
    box = [2.0, 1.5, 1.5, 8.0, 8.0]
    for text, words in (
        (via3({"1": "0"}, box), []),
        (via3({"1": "0"}, box).replace("0.png", "9.png"), ["--boxes"]),
        (via3({}, []), []),
        (via3({"1": "0"}, [])[:-9], []),
    ):
        file.write_text(text)
        result = CliRunner().invoke(label_app, ["import", str(file), *words])
        assert result.exit_code == 2 and "Traceback" not in result.output and read_judgements() == [], result.output
    for text, words in ((via3({"1": "0"}, []), []), (via3({"1": "0"}, box), ["--boxes"])):
        file.write_text(text)
        assert CliRunner().invoke(label_app, ["import", str(file), *words]).exit_code == 0
        assert [one.label for one in read_judgements()] == ["Mars"]


def test_a_table(tmp_path: Path) -> None:
    "With a column of paths and one of labels; else the answer names the formats, and what this file looks like."
    pictures(tmp_path / "in", 2)
    file = tmp_path / "in/labels.csv"
    for text in (
        "path,label\n0.png,Mars\n1.png,\n",
        "path,label\n0.png,Mars\n9.png,Moon\n",
        "path,kind\n0.png,Mars\n",
        "Dear sir\n",
    ):
        file.write_text(text)
        result = CliRunner().invoke(label_app, ["import", str(file)])
        assert result.exit_code == 2 and "Traceback" not in result.output and read_judgements() == [], result.output
    assert "Dear sir" in result.output and "VIA" in result.output and "file_name" in result.output
    file.write_text("path;label\n0.png;Mars\n1.png;Moon\n")
    (tmp_path / "in/lines.jsonl").write_text('{"file_name": "0.png", "label": "Pluto"}\n')
    for name, labels in (("labels.csv", ["Mars", "Moon"]), ("lines.jsonl", ["Mars", "Moon", "Pluto"])):
        assert (
            CliRunner().invoke(label_app, ["import", str(tmp_path / "in" / name), "--annotator", name]).exit_code == 0
        )
        assert sorted(one.label for one in read_judgements()) == labels
    for words in ([tmp_path / "in/0.png"], [tmp_path / "in", "--format", "via"]):  # a picture; no such file in there
        assert CliRunner().invoke(label_app, ["import", *map(str, words)]).exit_code == 2
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    assert "Formats: CVAT" in CliRunner().invoke(label_app, ["import", str(tmp_path / "coco.json")]).output


def test_archives_of_strangers(tmp_path: Path) -> None:
    "A bomb, members outside of their folder, and a picture that is none."
    members = {
        "bomb": {"annotations.xml": "<annotations>" + " " * 60_000_000},
        "outside": {"../annotations.xml": cvat(["0.png"]), "../0.png": "x"},
        "no picture": {"annotations.xml": cvat(["0.png"]), "images/0.png": "text"},
    }
    for name, inside in members.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in inside.items():
                archive.writestr(member, content)
        with pytest.raises(CelestialError):
            import_labels(tmp_path / f"{name}.zip")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "no picture.zip").read_bytes()[:-30])
    with pytest.raises(CelestialError):
        import_labels(tmp_path / "cut.zip")
    assert read_judgements() == []


# The model for Label Studio


SERVE = """
from celestial_ml.label.ml_backend import serve_backend
from celestial_ml.label.task_images import TaskImages
serve_backend({model!r}, TaskImages({studio!r}), port=0)
"""


def backend(model: Path, log: Path, studio: str) -> AbstractContextManager[str]:
    "As `celestial label serve` does it, until the end of the block."
    return running(model, log, serve=SERVE.format(model=str(model), studio=studio))


def ask(url: str, body: object = None, **headers: str) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"} | headers), timeout=120) as answer:
        return json.loads(answer.read() or "{}")


def test_the_key_is_in_no_log(tmp_path: Path) -> None:
    "Not where it is taken, nor where a request with it is wrong, nor in an answer."
    model, key = tiny_model(tmp_path / "model"), "per-aspera-ad-astra-secret"
    about = {
        "project": "1.1",
        "schema": label_config(["Mars"]),
        "hostname": "http://169.254.169.254",
        "access_token": key,
    }
    answers = []
    with backend(model, tmp_path / "log", f"http://127.0.0.1:{free_port()}") as url:
        for body in (about, about | {"schema": "<a>"}, about | {"schema": 3}, [about], about | {"access_token": [key]}):
            try:
                answers.append(str(ask(f"{url}/setup", body)))
            except OSError as e:
                answers.append(getattr(e, "read", lambda e=e: str(e).encode())().decode())
        task = {"tasks": [{"id": 1, "data": {"image": "/data/upload/1/a.png"}}], "label_config": about["schema"]}
        answers.append(str(ask(f"{url}/predict", task)))
        assert ask(f"{url}/health")["status"] == "UP"
    log = (tmp_path / "log").read_text()
    assert "/setup" in log and "task 1" in log, "there is a log"
    assert key not in log and not any(key in answer for answer in answers)


# A real Label Studio


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "A Label Studio of its own environment, on a free port."
    program = Path(os.environ.get("CELESTIAL_LABEL_STUDIO", ""), "bin/label-studio")
    if not program.is_file():
        pytest.skip("CELESTIAL_LABEL_STUDIO names no environment with Label Studio")
    folder, port = tmp_path_factory.mktemp("studio"), free_port()
    tables = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "celestial_ml/label_studio.sqlite3"
    if tables.exists():  # making them takes minutes
        shutil.copy(tables, folder)
    off = dict.fromkeys(
        ("ML_BLOCK_LOCAL_IP", "SSRF_PROTECTION_ENABLED", "COLLECT_ANALYTICS", "LATEST_VERSION_CHECK"), "false"
    )
    env = os.environ | off | {"LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true", "LABEL_STUDIO_BASE_DATA_DIR": str(folder)}
    env.pop("PYTHONPATH", None)
    words = ["start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port), "--user-token", TOKEN]
    words += ["--username", "a@example.org", "--password", "per-aspera-ad-astra"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([str(program), *words], env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        url, latest = f"http://127.0.0.1:{port}", time.monotonic() + 900
        while True:
            try:
                assert ask(f"{url}/health")["status"] == "UP"
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < latest, (folder / "log").read_text()[-2000:]
                time.sleep(1)
        if not tables.exists():
            tables.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "label_studio.sqlite3", tables)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def png(body: str) -> bytes:
    "A picture of a body."
    file = io.BytesIO()
    Image.fromarray(render(body)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.label_studio
def test_a_team_in_label_studio(studio: str, tmp_path: Path) -> None:
    "A project with guesses, a model that Label Studio asks, what a person chose, and all of it back."
    [site] = Path(os.environ["CELESTIAL_LABEL_STUDIO"]).glob("lib/python*/site-packages")  # the SDK is there
    sdk, token = f"sys.path.append({str(site)!r})", {"Authorization": f"Token {TOKEN}"}
    model = tiny_model(tmp_path / "model")
    (tmp_path / "in").mkdir()
    for body in ("Mars", "Neptune"):
        (tmp_path / f"in/{body.lower()}.png").write_bytes(png(body))

    words = (
        "label",
        "export",
        studio,
        "--project",
        "Planets",
        "--images",
        str(tmp_path / "in"),
        "--model",
        str(model),
        "--json",
    )
    sent = celestial(*words, before=sdk, **{KEY: TOKEN})
    assert sent.returncode == 0, sent.stderr
    project = json.loads(sent.stdout)["project"]
    assert json.loads(sent.stdout)["sent"] == 2
    assert json.loads(celestial(*words, before=sdk, **{KEY: TOKEN}).stdout)["sent"] == 0, "again"
    wrong = celestial(*words, before=sdk, **{KEY: "wrong-secret"})
    assert wrong.returncode == 2 and "401" in wrong.stderr and "wrong-secret" not in wrong.stderr + wrong.stdout

    def tasks() -> list[dict]:
        return ask(f"{studio}/api/tasks?project={project}&fields=all", **token)["tasks"]

    def guesses() -> dict[str, list[tuple[str, str]]]:
        "Of each task by its number: versions and choices."
        rows = {t["id"]: t["predictions"] for t in tasks()}
        return {
            n: [(p["model_version"], p["result"][0]["value"]["choices"][0]) for p in some] for n, some in rows.items()
        }

    assert sorted(guesses().values()) == [[("tiny/7", "Mars")], [("tiny/7", "Neptune")]]

    other = tiny_model(tmp_path / "other")  # the next version
    about = json.loads((other / "model.json").read_text()) | {"version": "8"}
    (other / "model.json").write_text(json.dumps(about))
    with backend(other, tmp_path / "log", studio) as url:
        connected = ask(f"{studio}/api/ml/", {"url": url, "project": project, "title": "celestial"}, **token)
        assert connected["state"] == "CO", connected
        file = [
            {"data": {"image": "http://169.254.169.254/latest/meta-data"}},
            {"data": {"image": "http://127.0.0.1:9/a.png"}},
        ]
        ask(f"{studio}/api/projects/{project}/import", file, **token)  # Label Studio takes such addresses
        for task in tasks():
            ask(f"{studio}/api/tasks/{task['id']}", **token)  # opening one asks the model
        ask(
            f"{studio}/api/dm/actions?id=retrieve_tasks_predictions&project={project}",
            {"selectedItems": {"all": True, "excluded": []}},
            **token,
        )
        after = [some for some in guesses().values() if some]
        assert len(after) == 2 and all({"tiny/7", "tiny/8"} == {version for version, _ in some} for some in after), (
            after
        )
        assert all(len({label for _, label in some}) == 1 for some in after)

        task = next(t for t in tasks() if t["data"].get("sha256") == sha256_of(tmp_path / "in/mars.png"))
        choice = {"from_name": "class", "to_name": "image", "type": "choices", "value": {"choices": ["Moon"]}}
        ask(f"{studio}/api/tasks/{task['id']}/annotations/", {"result": [choice]}, **token)
        event = {"action": "ANNOTATION_CREATED", "task": task, "annotation": {"result": [choice], "completed_by": 1}}
        event["project"] = ask(f"{studio}/api/projects/{project}", **token)
        until(lambda: len(read_judgements()) == 1)  # Label Studio's own webhook, which connecting the model has made
        assert ask(f"{url}/webhook", event) == {"stored": 0}, "the same again"
        ask(f"{studio}/api/ml/{connected['id']}/train", {}, **token)
        assert len(read_judgements()) == 1, "START_TRAINING trains nothing"
    log = (tmp_path / "log").read_text()
    assert TOKEN not in log and "169.254.169.254:80 are not allowed" in log and "/webhook" in log

    fetched = celestial("label", "import", studio, "--project", "Planets", "--json", before=sdk, **{KEY: TOKEN})
    assert fetched.returncode == 0 and json.loads(fetched.stdout)["labels"] == 1, fetched.stderr
    [row] = read_judgements()
    assert (row.sha256, row.label, row.status) == (sha256_of(tmp_path / "in/mars.png"), "Moon", "proposed")
    assert row.annotator == "Label Studio 1" and row.source == "label-studio"
    exported = ask(f"{studio}/api/projects/{project}/export?exportType=JSON", **token)
    (tmp_path / "export.json").write_text(json.dumps(exported))
    assert import_labels(tmp_path / "export.json")["new"] == 0, "the same from a file"
