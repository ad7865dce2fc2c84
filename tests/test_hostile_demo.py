"""The demo under bad will: paths of the server, other people's uploads, full disks, guesses at its login."""

import contextlib
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from serving import encoded, neptune, running, tiny_model

from celestial_ml.planets.renderer import render
from celestial_ml.serve.settings import password_hash

FILE = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def temporary(folder: Path) -> Path:
    "Where this server's uploads are."
    (folder / "tmp").mkdir()
    return folder / "tmp"


@pytest.fixture(scope="module")
def url(folder: Path, temporary: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(temporary))
        with running(tiny_model(folder / "model"), folder / "log", max_bytes=2_000_000, upload_bytes=30_000_000) as at:
            yield at
    assert not list(temporary.glob("celestial-demo-*")), "a server leaves nothing"


class Page:
    "A page that somebody has open, without a browser."

    def __init__(self, url: str):
        self.client = httpx.Client(base_url=url, timeout=20)
        self.client.get("/")
        config = self.client.get("/config").json()
        self.calls = config["dependencies"]
        self.ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
        self.kinds = {c["id"]: c["type"] for c in config["components"]}

    def call(self, target: str, event: str) -> dict[str, Any]:
        "The call that follows an event of a part of the page."
        return next(c for c in self.calls if [self.ids[target], event] in [list(t) for t in c["targets"]])

    def body(self, call: dict[str, Any], file: Any, session: str = "me") -> dict[str, Any]:
        "What the page sends for it."
        data = [{"file": file, "number": 1.0}.get(self.kinds[one]) for one in call["inputs"]]
        return {"data": data, "fn_index": call["id"], "session_hash": session, "trigger_id": None, "event_data": None}

    def ask(self, target: str, file: Any, session: str = "me", event: str = "upload") -> httpx.Response:
        "Drop a file on a part of the page."
        call = self.call(target, event)
        path = "/gradio_api/queue/join" if call["queue"] is not False else "/gradio_api/run/predict"
        return self.client.post(path, json=self.body(call, file, session))

    def then(self, first: dict[str, Any], session: str = "me") -> httpx.Response:
        "What the page asks after a call."
        call = next(c for c in self.calls if c["trigger_after"] == first["id"])
        return self.client.post("/gradio_api/run/predict", json=self.body(call, None, session))

    def send(self, content: bytes, name: str = "neptune.png") -> str:
        "Upload a file."
        answer = self.client.post("/gradio_api/upload", files={"files": (name, content)})
        assert answer.status_code == 200, answer.text
        return answer.json()[0]

    def hear(self, session: str = "me") -> str:
        "What comes of a call that waits."
        with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as answer:
            return "".join(answer.iter_text())


@pytest.fixture
def page(url: str) -> Page:
    return Page(url)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def left(temporary: Path) -> list[Path]:
    "The uploads that are on disk."
    return [path for path in temporary.glob("celestial-demo-*/*") if path.is_file() and path.name != "lock"]


# ------------------------------------------------------------------------------------------------- files of the server

TABS = ("drop", "compare-drop", "many-drop", "folder-drop")


def file_of(target: str, path: Any, **more: Any) -> Any:
    one = {"path": path} | FILE | more
    return [one] if target in TABS[2:] else one


@pytest.mark.parametrize("target", TABS)
def test_only_uploads_of_the_same_person_are_read(
    page: Page, url: str, folder: Path, temporary: Path, target: str
) -> None:
    picture = folder / "secret.png"
    picture.write_bytes(neptune())
    fifo, link = folder / "fifo", folder / "link.png"
    if not fifo.exists():
        os.mkfifo(fifo)
        link.symlink_to(picture)
    stranger = Page(url)
    theirs = stranger.send(neptune())
    on_disk = str(left(temporary)[-1])
    paths = [str(picture), str(link), str(fifo), str(folder), "/etc/passwd", "/dev/zero", "/proc/self/environ"]
    paths += [
        f"../../..{picture}",
        f"{os.path.relpath(picture)}",
        f"file://{picture}",
        f"%2F..{picture}",
        "~/.ssh/id_rsa",
    ]
    paths += [
        "http://127.0.0.1:1/",
        "https://example.org/a.png",
        "//example.org/a",
        "data:image/png;base64,iVBORw0KGgo=",
    ]
    paths += [theirs, on_disk, f"{theirs}/../{theirs}", "", "\0", "no/such/file", f"{url}/health", "lock", "."]
    began, answers = time.monotonic(), []
    for path in paths:
        answers.append(page.ask(target, file_of(target, path)))
        answers.append(page.ask(target, file_of(target, path, url="http://127.0.0.1:1/x", is_stream=True)))
    assert time.monotonic() - began < 0.1 * len(answers), "refused at once"
    assert {code(answer) for answer in answers} == {(403, "no_upload")}
    assert len({answer.text for answer in answers}) == 1, "whether there is such a file shows nowhere"
    assert stranger.ask(target, file_of(target, theirs)).status_code == 200
    if target in TABS[2:]:
        stranger.hear()


@pytest.mark.parametrize("shape", ["list", "nested", "extra", "number", "text", "state", "surrogate"])
def test_a_path_cannot_be_smuggled_in_other_fields(page: Page, shape: str) -> None:
    call = page.call("drop", "upload")
    hidden = {"path": "/etc/hostname"} | FILE
    inputs = {
        "list": [[hidden], 1.0, None],
        "nested": [{"path": hidden} | FILE, 1.0, None],
        "extra": [None, 1.0, None, hidden],
        "number": [None, hidden, None],
        "text": ["/etc/hostname", 1.0, None],
        "state": [None, 1.0, hidden],
        "surrogate": [{"path": "\ud800"} | FILE, 1.0, None],
    }
    body = page.body(call, None) | {"data": inputs[shape], "event_data": hidden, "oauth_token": "x", "event_id": "x"}
    headers = {"Content-Type": "application/json"}
    answer = page.client.post("/gradio_api/run/predict", content=json.dumps(body), headers=headers)
    if shape == "state":  # what is on the server stays
        assert answer.status_code == 200 and "hostname" not in answer.text, answer.text
    else:
        assert answer.status_code in (403, 422) and "hostname" not in answer.text


def test_an_own_upload_is_answered_and_deleted(page: Page, temporary: Path) -> None:
    before = set(left(temporary))
    for target in TABS:
        name = page.send(neptune(), "../../neptune.png")
        assert name.endswith("/neptune.png") and name.count("/") == 1, "no path of the server"
        answer = page.ask(target, file_of(target, name))
        assert answer.status_code == 200, answer.text
        if target == "drop":
            assert "This is Neptune" in answer.text
        if target in TABS[2:]:
            heard = page.hear()
            assert "1 picture, 0 unknown" in heard and "neptune.png" in heard
        if target != "compare-drop":  # that one is looked at again
            assert code(page.ask(target, file_of(target, name))) == (403, "no_upload")
    first = page.call("compare-drop", "upload")
    assert "The picture that both see" not in page.then(first, "another page").text
    chosen = page.client.post(
        "/gradio_api/run/predict",
        json=page.body(page.call("compare-picture", "input"), None) | {"data": ["Mars", None]},
    )
    assert chosen.status_code == 200
    assert not set(left(temporary)) - before


def test_routes_that_the_page_does_not_need_are_not_there(page: Page, folder: Path) -> None:
    (folder / "here.txt").write_text("secret")
    reads = ["/monitoring", "/monitoring/summary", "/monitoring/x", "/gradio_api/token", "/gradio_api/user"]
    reads += [f"/gradio_api/file={path}" for path in ("/etc/passwd", folder / "here.txt", "http://127.0.0.1:1/", ".")]
    reads += ["/gradio_api/file//etc/passwd", "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/queue/status"]
    reads += ["/gradio_api/deep_link?session_hash=me", "/gradio_api/runs", "/gradio_api/openapi.json", "/pwa_icon"]
    reads += ["/static/../../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/assets/..%2f..%2fetc%2fpasswd"]
    reads += [
        "/svelte/../a",
        "/gradio_api/custom_component/a/client/b/c",
        "/gradio_api/vibe-code",
        "/gradio_api/dev/reload",
    ]
    posts = [
        "/gradio_api/component_server",
        "/gradio_api/stream/x",
        "/gradio_api/call/predict",
        "/gradio_api/vibe-edit",
    ]
    posts += [
        "/gradio_api/call/v2/dropped",
        "/gradio_api/process_recording",
        "/gradio_api/cancel",
        "/gradio_api/api/predict",
    ]
    posts += ["/gradio_api/run-history/connect", "/gradio_api/reset", "/login"]
    answers = [page.client.get(path) for path in reads] + [page.client.post(path, json={"data": []}) for path in posts]
    assert {code(answer) for answer in answers} == {(404, "not_found")}
    assert page.client.get("/?deep_link=../../etc").status_code == 200


def test_calls_that_no_page_makes_are_client_errors(page: Page, folder: Path) -> None:
    good = page.body(page.call("drop", "upload"), None)
    wrong: list[Any] = [7, [], "x", {}, {"data": []}]
    wrong += [good | {"fn_index": index} for index in (None, -1, 10**9, "3", 1.0, True, [], {})]
    wrong += [good | {"data": data} for data in (None, {}, [], [None], [None] * 4, [None, "soon", None])]
    wrong += [good | {"data": [None, number, None]} for number in (True, [], {}, 1e300, -(10**30))]
    wrong += [good | {"session_hash": name} for name in (None, 7, [], "x" * 65)]
    fool = page.call("roll", "input")
    wrong += [good | {"fn_index": fool["id"], "data": ["Moon", *[0.0] * 6, value]} for value in (None, "a", 1e9)]
    wrong += [good | {"fn_index": fool["id"], "data": [body, *[0.0] * 7]} for body in (None, "Sirius", 7, ["Moon"], {})]
    pressed = page.call("above", "click")
    wrong += [
        good | {"fn_index": pressed["id"], "data": [], "event_data": d} for d in (None, 7, "x", [], {}, {"cell": []})
    ]
    as_json = {"Content-Type": "application/json"}
    for path in ("/gradio_api/run/predict", "/gradio_api/queue/join"):
        for body in wrong:
            assert page.client.post(path, json=body).status_code == 422, (path, body)
        for text in ("", "{", "[" * 100_000, "NaN" * 3, '{"a":' * 50_000, "\xff", "1" * 5000):
            answer = page.client.post(path, content=text.encode("latin-1"), headers=as_json)
            assert answer.status_code in (400, 422), text[:9]
        long = b"[" + b"1," * 600_000 + b"1]"
        assert code(page.client.post(path, content=long, headers=as_json)) == (413, "too_many_bytes")
        assert page.client.post(path, content=json.dumps(good)).status_code == 415, (
            "as another site's form would send it"
        )
    more = good | {
        "trigger_id": 10**12,
        "event_data": {"a": {"path": "/etc/passwd"}},
        "batched": True,
        "simple_format": 1,
    }
    assert page.client.post("/gradio_api/run/predict", json=more).status_code == 200
    log = (folder / "log").read_text()
    assert "Traceback" not in log


def test_two_pages_with_the_same_session_name_share_nothing(url: str) -> None:
    one, other = Page(url), Page(url)
    assert "This is Neptune" in one.ask("drop", {"path": one.send(neptune())} | FILE, "same").text
    assert "img class" not in other.then(other.call("drop", "upload"), "same").text
    assert "img class" in one.then(one.call("drop", "upload"), "same").text


# ------------------------------------------------------------------------------------------------------------- uploads


def test_uploads_have_quotas_and_leave_room_for_others(page: Page, url: str, temporary: Path) -> None:
    big = b"PK\x03\x04" + bytes(6_000_000)
    answers = [page.client.post("/gradio_api/upload", files={"files": ("a.zip", big)}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 413, 413], "10 MB for one person"
    assert code(answers[1]) == (413, "too_many_uploads")
    other = Page(url)
    assert other.client.post("/gradio_api/upload", files={"files": ("a.zip", big)}).status_code == 200
    strangers = [httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.zip", big)}) for _ in range(3)]
    assert {code(answer) for answer in strangers} == {(413, "too_many_uploads")}, "15 MB for one address"
    assert sum(path.stat().st_size for path in left(temporary)) <= 15_000_000
    for asker, name in ((page, answers[0].json()[0]), (other, other.send(b""))):
        asker.ask("many-drop", [{"path": name} | FILE])
        asker.hear()


def test_an_upload_that_is_not_an_image_is_not_stored(page: Page, temporary: Path) -> None:
    before = {path: path.stat().st_size for path in left(temporary)}
    name = page.send(b"<html>" + bytes(3_000_000), "page.html")
    new = [path.stat().st_size for path in left(temporary) if path not in before]
    assert new and max(new) <= 4096
    assert "MB allowed" in page.ask("drop", {"path": name} | FILE).text


@pytest.mark.parametrize("kind", ["parts", "fields", "header", "cut", "no boundary", "no form"])
def test_broken_upload_forms_leave_nothing(page: Page, temporary: Path, kind: str) -> None:
    head = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
    field = '--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'
    bodies = {
        "parts": f"{head}\r\n\r\n" * 1001 + "--x--\r\n",
        "fields": field * 20_000 + "--x--\r\n",
        "header": f"{head}X: {'a' * 100_000}\r\n\r\n\r\n--x--\r\n",
        "cut": f"{head}\r\nabc",
        "no boundary": "--x--",
        "no form": "{}",
    }
    kinds = {"no boundary": "multipart/form-data", "no form": "application/json"}
    headers = {"Content-Type": kinds.get(kind, "multipart/form-data; boundary=x")}
    before, began = len(left(temporary)), time.monotonic()
    answer = page.client.post("/gradio_api/upload", content=bodies[kind], headers=headers)
    assert answer.status_code == (413 if kind in ("parts", "fields") else 400), answer.text
    assert time.monotonic() - began < 2 and len(left(temporary)) == before


def test_uploads_count_for_the_rate_and_are_deleted_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    old = tmp_path / "celestial-demo-killed"
    old.mkdir()
    (old / "lock").touch()
    (old / "picture").write_bytes(b"x")
    settings = {"rate_limit": "3/minute", "upload_minutes": 0.02}
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", **settings) as url:
        assert not old.exists(), "what a killed server left"
        answers = [httpx.post(f"{url}/gradio_api/upload", files={"files": neptune()}) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert len(left(tmp_path)) == 3 and "SameSite=lax" in answers[0].headers["set-cookie"]
        end = time.monotonic() + 15
        while left(tmp_path):
            assert time.monotonic() < end, "they are still there"
            time.sleep(0.2)


def test_nothing_served_names_a_folder_of_the_server(page: Page, url: str, folder: Path) -> None:
    paths = (
        "",
        "config",
        "gradio_api/info",
        "docs",
        "openapi.json",
        "model",
        "model/card",
        "model/data_card.html",
        "ready",
        "health",
        "metrics",
    )
    texts = [page.client.get(f"/{path}").text for path in (*paths, "nothing", "assets/nothing", "gradio_api/file=/etc")]
    texts += [page.ask("drop", {"path": page.send(content)} | FILE).text for content in (neptune(), b"no picture")]
    assert all(texts)
    here = (str(folder), str(Path.cwd()), f"{Path.home()}/", f"{sys.prefix}/")
    assert [place for place in here for text in texts if place in text] == []


# ------------------------------------------------------------------------------------------------------ many at a time


def test_open_connections_and_waiting_calls_are_bounded(page: Page, url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        heads = []
        for i in range(60):
            line = stack.enter_context(socket.create_connection((host, int(port))))
            line.sendall(f"GET /gradio_api/heartbeat/x{i} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            line.settimeout(5)
            heads.append(line.recv(12))
        assert Counter(heads) == {b"HTTP/1.1 200": 32, b"HTTP/1.1 503": 28}
        assert httpx.get(f"{url}/health").status_code == 200
    call, names = page.call("many-drop", "upload"), [page.send(neptune()) for _ in range(6)]
    body = page.body(call, [{"path": name} | FILE for name in names])
    with ThreadPoolExecutor(16) as pool:
        joins = list(
            pool.map(
                lambda i: page.client.post("/gradio_api/queue/join", json=body | {"session_hash": f"s{i}"}), range(80)
            )
        )
    assert {answer.status_code for answer in joins} <= {200, 403, 503}
    assert code(page.client.get("/gradio_api/queue/data?session_hash=nobody")) == (404, "no_session")
    assert httpx.get(f"{url}/health").status_code == 200


def test_pages_decode_within_the_scorers_bounds(page: Page, url: str) -> None:
    "Many large pictures at once are answered or turned away, one after the other; small ones go on."
    large = encoded(render("Neptune", size=64).repeat(100, 0).repeat(100, 1), "JPEG", quality=20)
    pages = [Page(url) for _ in range(6)]
    names = [one.send(large) for one in pages]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda p: p[0].ask("drop", {"path": p[1]} | FILE), zip(pages, names, strict=True)))
    assert {answer.status_code for answer in answers} == {200}
    assert all("Neptune" in a.text or "Too many people" in a.text for a in answers)


# --------------------------------------------------------------------------------------------------------------- login


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[str]:
    settings = {"demo_login": f"anna:{password_hash('per aspera')}", "login_guesses": "12/minute", "login_hours": 0.001}
    with running(tiny_model(folder / "guarded"), folder / "guarded.log", **settings) as at:
        yield at


def enter(client: httpx.Client, name: str = "anna", password: str = "per aspera") -> httpx.Response:
    return client.post("/login", data={"username": name, "password": password})


def test_a_login_expires_and_its_cookie_is_protected(guarded: str) -> None:
    with httpx.Client(base_url=guarded, timeout=20) as client:
        for path in ("/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=a", "/gradio_api/heartbeat/a"):
            assert code(client.get(path)) == (401, "no_login")
        for path in ("/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/queue/join"):
            assert code(client.post(path)) == (401, "no_login")
        assert "auth_required" in client.get("/").text
        answer = enter(client)
        assert answer.status_code == 200 and client.get("/config").status_code == 200
        [cookie] = answer.headers.get_list("set-cookie")
        assert all(word in cookie for word in ("HttpOnly", "SameSite=lax", "Max-Age=3;", "Path=/")), cookie
        assert client.get("/logout").status_code == 303 and client.get("/config").status_code == 401
        token = enter(client).cookies
        time.sleep(4)
        client.cookies.update(token)  # the browser would have dropped it
        assert code(client.get("/config")) == (401, "no_login")


def test_unknown_names_take_as_long_and_guesses_are_limited_and_logged(guarded: str, folder: Path) -> None:
    with httpx.Client(base_url=guarded, timeout=20) as client:
        took: dict[str, list[float]] = {"anna": [], "nobody": []}
        for _ in range(5):
            for name, times in took.items():
                began = time.perf_counter()
                assert code(enter(client, name, "guess")) == (400, "wrong_login")
                times.append(time.perf_counter() - began)
        assert 0.6 < median(took["anna"]) / median(took["nobody"]) < 1.6, took
        assert enter(client, "\U0001f680\n[x]", "a" * 10_000).status_code == 400
        assert client.post("/login", content=b"x" * 20_000).status_code == 413
        assert client.post("/login", data={"username": "anna"}).status_code == 400
        answers = [enter(client, "anna", "guess") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [400, 429, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60 and code(answers[-1]) == (429, "too_many_guesses")
        assert code(enter(client)) == (429, "too_many_guesses")
    log = (folder / "guarded.log").read_text()
    assert "login of 'anna' refused to 127.0.0.1: wrong_login" in log and "too_many_guesses" in log
    assert "per aspera" not in log and 'guess"' not in log and "Traceback" not in log


def test_many_guesses_at_once_take_little_memory(tmp_path: Path) -> None:
    settings = {"demo_login": f"anna:{password_hash('per aspera')}", "login_guesses": "100000/minute"}
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", **settings) as url:

        def guess(_: int) -> int:
            return httpx.post(f"{url}/login", data={"username": "anna", "password": "x"}, timeout=30).status_code

        with ThreadPoolExecutor(32) as pool:
            statuses = Counter(pool.map(guess, range(96)))
        assert set(statuses) <= {400, 503} and statuses[503] > 0, statuses
        assert enter(httpx.Client(base_url=url)).status_code == 200


# ---------------------------------------------------------------------------------------------------------- judgements


def test_one_judgement_per_person_and_request_counts(url: str, folder: Path) -> None:
    import sqlite3

    number = httpx.post(f"{url}/predict", files={"image": neptune()}).json()["request_id"]
    for label in ("Mars", "Moon", "Pluto"):
        said = {"request_id": number, "correct": False, "label": label}
        assert httpx.post(f"{url}/feedback", json=said).status_code == 200
    with contextlib.closing(sqlite3.connect(folder / "home" / "predictions.db")) as database:
        rows = database.execute("SELECT label FROM feedback WHERE request_id = ?", (number,)).fetchall()
    assert rows == [("Pluto",)], "the last one"


def test_judgements_are_rate_limited(tmp_path: Path) -> None:
    with running(tiny_model(tmp_path / "m"), tmp_path / "log", demo=False, feedback_limit="3/hour") as url:
        number = httpx.post(f"{url}/predict", files={"image": neptune()}).json()["request_id"]
        said = {"request_id": number, "correct": True}
        answers = [httpx.post(f"{url}/feedback", json=said) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert int(answers[-1].headers["retry-after"]) > 60


# ------------------------------------------------------------------------------------------------------- other machines

ELSEWHERE = """
import celestial_ml.serve.server as server
from celestial_ml.demo.routes import add_demo
from celestial_ml.serve.settings import serve_settings
server.serve({model!r}, "0.0.0.0", port=0, demo=add_demo, settings=serve_settings())
"""


@pytest.mark.parametrize("opened", ["", "login", "open"])
def test_the_demo_is_public_only_with_a_login_or_a_setting(tmp_path: Path, opened: str) -> None:
    more = {"login": {"demo_login": f"anna:{password_hash('x')}"}, "open": {"open_demo": "true"}}.get(opened, {})
    code = ELSEWHERE.format(model=str(tiny_model(tmp_path / "model")))
    with running(None, tmp_path / "log", serve=code, **more) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.post(f"{url}/predict", files={"image": neptune()}).json()["label"] == "Neptune"
        assert httpx.get(url, timeout=20).status_code == (200 if opened else 404)
