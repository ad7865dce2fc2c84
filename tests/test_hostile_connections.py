"Heads, connections and bodies that are meant to hurt: a whole server, raw sockets, and a healthy client beside them."

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from programs import resident_mb
from serving import neptune, running, tiny_model, until

from celestial_ml.serve.settings import new_key

LIMITED = (  # with few descriptors, as a system may give them
    "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}));"
    "from celestial_ml.demo.routes import add_demo; from celestial_ml.serve.server import serve;"
    "from celestial_ml.serve.settings import serve_settings;"
    "serve({model!r}, port=0, demo=add_demo if {demo} else None, settings=serve_settings())"
)


class Served:
    "A server under attack."

    def __init__(self, url: str, log: Path):
        self.url, self.log, self.address = url, log, ("127.0.0.1", int(url.rpartition(":")[2]))
        self.held: list[socket.socket] = []

    def connect(self, content: bytes = b"") -> socket.socket:
        one = socket.create_connection(self.address, timeout=10)
        self.held.append(one)
        one.sendall(content)
        return one

    def healthy(self) -> None:
        "A new client is answered within a second: one of three, for the machine may be busy with something else."
        took = []
        while not took or (min(took) >= 1 and len(took) < 3):
            began = time.monotonic()
            assert httpx.post(f"{self.url}/predict", files={"image": neptune()}, timeout=10).status_code == 200
            took.append(time.monotonic() - began)
        assert min(took) < 1, took

    def figure(self, name: str, label: str = "") -> float:
        page = httpx.get(f"{self.url}/metrics", timeout=10).text
        return sum(
            float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name) and label in line
        )

    @property
    def pid(self) -> int:
        return int(self.figure("celestial_process_id "))

    def resident_mb(self) -> float:
        return resident_mb(self.pid)

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())


@contextmanager
def served(folder: Path, descriptors: int = 1024, demo: bool = False, **settings: object) -> Iterator[Served]:
    code = LIMITED.format(descriptors=descriptors, model=str(tiny_model(folder / "model")), demo=demo)
    with running(None, folder / "log", serve=code, **settings) as url:
        one = Served(url, folder / "log")
        try:
            yield one
        finally:
            for held in one.held:
                held.close()
    logged = (folder / "log").read_text()
    assert demo or "Traceback" not in logged


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Iterator[Served]:
    "A server whose times are short."
    times = {"head_seconds": 0.6, "idle_seconds": 0.6, "body_seconds": 2, "read_seconds": 1}
    with served(tmp_path_factory.mktemp("quick"), **times) as one:
        yield one


def answer(one: socket.socket) -> bytes:
    "All that comes until the server closes."
    content = b""
    try:
        while piece := one.recv(65536):
            content += piece
    except ConnectionResetError:
        pass
    return content


def code(content: bytes) -> tuple[int, str]:
    "Status and code of a refusal in our form, with our headers."
    head, _, body = content.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    names = {line.partition(":")[0] for line in lines[1:]}
    assert {"x-request-id", "x-content-type-options", "content-security-policy"} <= names and "server" not in names
    assert "content-type: application/json" in lines and "connection: close" in lines
    problem = json.loads(body)["error"]
    assert set(problem) == {"code", "message", "hint"} and all(problem.values())
    return int(lines[0].split()[1]), problem["code"]


GET = b"GET /health HTTP/1.1\r\nHost: here\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: multipart/form-data; boundary=b\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BAD = (400, "bad_request")
LARGE = (431, "head_too_large")
HEADS: dict[str, tuple[bytes, tuple[int, str]]] = {
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", BAD),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD),
    "absurd method": (b"BREW /health HTTP/1.1\r\nHost: here\r\n\r\n", BAD),
    "folded header": (GET + b"A: b\r\n c\r\n\r\n", BAD),
    "space before the colon": (GET + b"A : b\r\n\r\n", BAD),
    "NUL in a header": (GET + b"A: b\0c\r\n\r\n", BAD),
    "path that isn't ASCII": (b"GET /\xff HTTP/1.1\r\nHost: here\r\n\r\n", BAD),
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", BAD),
    "length and pieces": (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc", BAD),
    "negative length": (POST + b"Content-Length: -3\r\n\r\nabc", BAD),
    "long address": (b"GET /" + 20_000 * b"a" + b" HTTP/1.1\r\n\r\n", (414, "url_too_long")),
    "many headers": (GET + b"".join(b"a%d: b\r\n" % i for i in range(200)) + b"\r\n", LARGE),
    "long header": (GET + b"a: " + 100_000 * b"b" + b"\r\n\r\n", LARGE),
    "long header without an end": (GET + b"a: " + 100_000 * b"b", LARGE),
    "long name without an end": (GET + 100_000 * b"b", LARGE),
    "empty lines": (100_000 * b"\r\n", LARGE),
    "pieces of a byte": (CHUNKED + 100_000 * b"1\r\nx\r\n", BAD),
    "long extension of a piece": (CHUNKED + b"1;" + 200_000 * b"a", BAD),
    "many headers after the body": (CHUNKED + b"0\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(9999)), LARGE),
    "a long one after the body": (CHUNKED + b"0\r\na: " + 300_000 * b"b", BAD),
    "length of a piece that is none": (CHUNKED + b"zz\r\n", BAD),
    "half a head": (GET, (408, "head_too_slow")),
}


@pytest.mark.parametrize("name", HEADS)
def test_malformed_heads_get_our_form_of_error(quick: Served, name: str) -> None:
    content, expected = HEADS[name]
    before = quick.figure("celestial_refusals_total", f'"{expected[1]}"')
    one = quick.connect()
    with suppress(ConnectionError):
        one.sendall(content)
    assert code(answer(one)) == expected
    assert quick.figure("celestial_refusals_total", f'"{expected[1]}"') == before + 1


def test_a_huge_head_takes_no_memory(quick: Served) -> None:
    before, one = quick.resident_mb(), quick.connect(GET)
    with pytest.raises(OSError):
        for i in range(145):
            one.sendall(b"a%d: " % i + 1_000_000 * b"b" + b"\r\n")
            time.sleep(0.02)
    assert quick.resident_mb() - before < 20
    quick.healthy()


def trickle(one: socket.socket, content: bytes, stop: threading.Event) -> None:
    for at in range(len(content)):
        if stop.wait(0.05):
            return
        try:
            one.send(content[at : at + 1])
        except OSError:
            return


@pytest.mark.parametrize("first", [b"", GET + b"\r\n"])
def test_a_slow_head_times_out(quick: Served, first: bytes) -> None:
    one, stop = quick.connect(first), threading.Event()
    if first:
        assert b" 200 " in one.recv(65536)
    began = time.monotonic()
    thread = threading.Thread(target=trickle, args=(one, GET + 999 * b"a", stop))
    thread.start()
    try:
        assert code(answer(one)) == (408, "head_too_slow")
        assert time.monotonic() - began < 3
    finally:
        stop.set()
        thread.join()


def test_an_unread_body_is_cut_off(quick: Served) -> None:
    one, stop = (
        quick.connect(b"POST /nowhere HTTP/1.1\r\nHost: here\r\nContent-Length: 9999\r\n\r\n"),
        threading.Event(),
    )
    thread = threading.Thread(target=trickle, args=(one, 9999 * b"a", stop))
    thread.start()
    try:
        assert b" 404 " in answer(one)
    finally:
        stop.set()
        thread.join()


def test_an_idle_connection_is_closed(quick: Served) -> None:
    for first in (b"", GET + b"\r\n"):
        began = time.monotonic()
        content = answer(quick.connect(first))
        assert time.monotonic() - began < 3 and content.startswith(b"HTTP/1.1 200" if first else b"")


@pytest.mark.parametrize("offer", ["h2c", "websocket", "tls/1.0, h2c"])
def test_an_offer_of_another_protocol_is_ignored(quick: Served, offer: str) -> None:
    "Java's client makes one with its first request, and sends the body all the same."
    with httpx.Client(base_url=quick.url, timeout=10) as client:
        headers = {"Connection": "Upgrade, HTTP2-Settings", "UPGRADE": offer}
        for _ in range(2):  # on the same connection
            answer = client.post("/predict", files={"image": neptune()}, headers=headers)
            assert answer.status_code == 200 and "connection" not in answer.headers


def test_pipelined_requests_are_answered_in_order(quick: Served) -> None:
    content = answer(quick.connect(5 * (GET + b"\r\n")))
    assert content.count(b"HTTP/1.1 200 OK") == 5
    before = quick.resident_mb()
    for _ in range(50):
        quick.connect(3000 * b"GET / HTTP/1.1\r\n\r\n")
    quick.healthy()
    assert quick.resident_mb() - before < 30


def test_a_client_that_never_reads_is_cut_off(quick: Served) -> None:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(quick.address)
    quick.held.append(one)
    one.sendall(8 * b"GET /docs/static/swagger-ui-bundle.js HTTP/1.1\r\nHost: here\r\n\r\n")
    until(lambda: quick.figure("celestial_refusals_total", '"not_read"') >= 1, 8, 0.2)


def test_silent_connections_do_not_block_new_ones(tmp_path: Path) -> None:
    with served(tmp_path, 512, address_connections=10_000) as server:
        before = server.descriptors()
        for kind in (b"", GET, POST + b"Content-Length: 9\r\n\r\n"):
            for _ in range(600):
                server.connect(kind)
            server.healthy()
            assert server.figure("celestial_connections ") <= 256
        assert server.figure("celestial_refusals_total", '"evicted"') > 300
        for one in server.held:
            one.close()
        until(lambda: server.descriptors() <= before + 2)


def test_connections_of_one_address_are_limited(tmp_path: Path) -> None:
    with served(tmp_path, address_connections=20) as server:
        held = [server.connect() for _ in range(50)]
        until(lambda: server.figure("celestial_connections ") <= 21)
        server.healthy()
        assert all(answer(one) == b"" for one in held[:25]), "the oldest go"


def test_a_new_connection_is_refused_when_all_others_are_busy(tmp_path: Path) -> None:
    times = {"connections": 8, "waiting": 64, "patience": 5, "explaining": 64}
    with served(tmp_path, **times) as server, ThreadPoolExecutor(8) as pool:
        stop, content = time.monotonic() + 3, neptune()

        def ask(_: int) -> list[int]:
            codes = []
            while time.monotonic() < stop:
                reply = httpx.post(f"{server.url}/explain", files={"image": content}, timeout=10)
                codes.append(reply.status_code)
                if reply.status_code == 503:
                    assert reply.headers["retry-after"] and reply.json()["error"]["code"]
            return codes

        codes = {one for codes in pool.map(ask, range(8)) for one in codes}
        assert 200 in codes and codes <= {200, 503}


def form(parts: bytes) -> bytes:
    return POST + b"Content-Length: %d\r\n\r\n" % len(parts) + parts


EMPTY = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n\r\n'
BODIES: dict[str, tuple[str, bytes, int]] = {
    "empty parts": ("/predict", 300_000 * EMPTY, 413),
    "fields": ("/predict", 300_000 * b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n', 413),
    "headers of a part": ("/predict", b"--b\r\n" + 1_000_000 * b"a: b\r\n", 400),
    "a header of a part": ("/predict", b"--b\r\na: " + 19_000_000 * b"b", 400),
    "delimiters that are none": ("/predict", EMPTY + 4_000_000 * b"\r\n--", 400),
    "after the end": ("/predict", EMPTY + b"--b--\r\n" + 19_000_000 * b"\r", 400),
    "keys": ("/feedback", json.dumps({f"k{i}": i for i in range(500_000)}).encode(), 413),
    "keys, 15 kB": ("/feedback", json.dumps({f"k{i}": i for i in range(1000)}).encode(), 422),
    "deep": ("/feedback", 16_000 * b"[", 400),
    "deep and closed": ("/feedback", 7_000 * b"[" + 7_000 * b"]", 400),
    "deep objects": ("/feedback", 2_500 * b'{"a":' + b"1" + 2_500 * b"}", 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_slow_body_does_not_delay_other_requests(quick: Served, name: str) -> None:
    path, body, expected = BODIES[name]
    kind = {"/predict": "multipart/form-data; boundary=b"}.get(path, "application/json")
    slowest, done = 0.0, threading.Event()

    def look() -> None:
        nonlocal slowest
        with httpx.Client(timeout=30) as client:
            while not done.is_set():
                began = time.monotonic()
                assert client.get(f"{quick.url}/health").status_code == 200
                slowest = max(slowest, time.monotonic() - began)

    with ThreadPoolExecutor(1) as pool:
        looked = pool.submit(look)
        try:
            reply = httpx.post(f"{quick.url}{path}", content=body, headers={"Content-Type": kind}, timeout=30)
        finally:
            done.set()
        looked.result()
    assert reply.status_code in ({400, 422} if expected == 400 else {expected}), reply.text
    assert set(reply.json()["error"]) == {"code", "message", "hint"} and slowest < 1


WORDS = [
    *('{"request_id": NaN, "correct": true}', '{"request_id": "a", "correct": Infinity}', "NaN", "null", "[]", '"', ""),
    *('{"request_id": "a\\u0000b", "correct": true}', '{"request_id": "\\ud800", "correct": true}', "{", "\ufeff{}"),
    *('{"request_id": "a", "correct": true, "comment": "\\u0000"}', '{"request_id": "a", "request_id": 1}'),
    *('{"\\ud800": 1}', '{"request_id": "a", "correct": false, "label": "\\ud800"}', "1" * 15_000),
    *(b'{"request_id": "\xff", "correct": true}', b"\xff\xfe", b"\x00", b"{\x00}"),
]


@pytest.mark.parametrize("body", WORDS)
def test_odd_json_is_a_client_error(quick: Served, body: str | bytes) -> None:
    reply = httpx.post(f"{quick.url}/feedback", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code in (400, 422), reply.text
    assert set(reply.json()["error"]) == {"code", "message", "hint"} and reply.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/%00", "/docs/static/%00", "/health%0d%0aX: y", "/model/%00", "/predict%7f"])
def test_control_characters_in_a_path(quick: Served, path: str) -> None:
    one = quick.connect(
        b"GET %s HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n" % path.replace(" ", "%20").encode()
    )
    assert code(answer(one)) == BAD


def test_all_bodies_share_one_memory_limit(tmp_path: Path) -> None:
    with served(tmp_path, body_memory=10_000_000, max_bytes=10_000_000, body_seconds=20) as server:
        before, start = server.resident_mb(), POST + b"Content-Length: 4000000\r\n\r\n" + EMPTY[:-2]
        for _ in range(2):  # these take eight of ten megabytes, and then nothing comes
            server.connect(start + 3_900_000 * b"x")
        until(lambda: server.figure("celestial_body_bytes ") > 7_000_000)
        large = EMPTY[:-2] + 3_000_000 * b"x" + b"\r\n--b--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        reply = httpx.post(f"{server.url}/predict", content=large, headers=headers, timeout=20)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "busy") and reply.headers["retry-after"]
        server.healthy()
        time.sleep(2)
        reply = httpx.post(f"{server.url}/predict", content=large, headers=headers, timeout=20)
        assert reply.status_code == 415, "the oldest has made way"
        assert code(answer(server.held[0])) == (408, "too_slow")
        server.held[1].close()
        until(lambda: server.figure("celestial_body_bytes ") == 0)
        assert server.resident_mb() - before < 60


def test_the_log_names_refused_clients(tmp_path: Path) -> None:
    key, entry = new_key("observatory")
    with served(tmp_path, api_keys=entry, rate_limit="2/minute", head_seconds=0.5) as server:
        for _ in range(200):
            server.connect(b"BREW / HTTP/1.1\r\n\r\n")
        ask: Callable[..., httpx.Response] = httpx.get
        assert ask(f"{server.url}/metrics").status_code == 401
        assert [ask(f"{server.url}/model", headers={"X-API-Key": key}).status_code for _ in range(3)] == [200, 200, 429]
        time.sleep(1.5)
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    bad = [line for line in lines if line.get("error") == "bad_request"]
    assert sum(line["count"] for line in bad) == 200 and len(bad) <= 3 and bad[0]["address"] == "127.0.0.1"
    [unknown] = [line for line in lines if line.get("error") == "no_key"]
    assert unknown["client"] == unknown["address"] == "127.0.0.1" and unknown["status"] == 401
    [often] = [line for line in lines if line.get("error") == "too_many_requests"]
    assert (often["client"], often["address"]) == ("observatory", "127.0.0.1")


def test_documentation_needs_the_key_where_there_are_keys(tmp_path: Path) -> None:
    key, entry = new_key("observatory")
    with served(tmp_path, api_keys=entry) as server, httpx.Client(base_url=server.url) as client:
        for path in ("/docs", "/docs/static/swagger-ui.css", "/openapi.json"):
            refused = client.get(path)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "no_key"
            assert refused.headers["www-authenticate"].startswith("Basic ")
            assert client.get(path, auth=("any", key)).status_code == 200, "as a browser asks a person for it"
            assert client.get(path, headers={"X-API-Key": key}).status_code == 200
        assert client.get("/model", auth=("any", key)).status_code == 401, "a browser may not send it everywhere"
        assert "server" not in client.get("/health").headers


DEMO = {
    "a function that there isn't": {"data": [], "fn_index": 99_999, "session_hash": "a"},
    "deep": {"data": json.loads(900 * "[" + 900 * "]"), "fn_index": 0, "session_hash": "a"},
    "half a character": {"data": ["\ud800"], "fn_index": 0, "session_hash": "\ud800"},
    "NaN": {"data": [float("nan")], "fn_index": 0, "session_hash": "a"},
    "words": {"data": "words", "fn_index": "x", "session_hash": ["a"]},
    "large": {"data": 100_000 * [0], "fn_index": 0, "session_hash": "a"},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("demo"), demo=True) as one:
        yield one


@pytest.mark.parametrize("name", DEMO)
def test_odd_json_to_the_demo_gets_our_form_of_error(demo: Served, name: str) -> None:
    body = json.dumps(DEMO[name])
    for path in ("queue/join", "run/said_right", "api/said_right", "call/said_right", "call/v2/said_right", "reset"):
        with httpx.Client(timeout=30, headers={"Content-Type": "application/json"}) as client:
            reply = client.post(f"{demo.url}/gradio_api/{path}", content=body)
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"code", "message", "hint"}
        if name == "large":
            assert reply.status_code in (404, 413, 422)
