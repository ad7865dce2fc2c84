"The service under bad luck and bad will: swaps, overload, slow and vanishing clients, keys, fuzzed uploads."

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from programs import resident_mb
from serving import encoded, neptune, running, tiny_model, until

from celestial_ml.core.files import read_json, sha256_of, write_json
from celestial_ml.planets.renderer import render
from celestial_ml.serve.settings import ServeSettings, new_key, password_hash

ROOT = Path(__file__).resolve().parent.parent


def send(client: httpx.Client, content: bytes, **headers: str) -> httpx.Response:
    return client.post("/predict", files={"image": content}, headers=headers)


def code(answer: httpx.Response) -> tuple[int, str]:
    "Status and code of an error in the one form."
    problem = answer.json()["error"]
    assert set(problem) == {"code", "message", "hint"} and problem["message"] and problem["hint"]
    assert "Traceback" not in answer.text and answer.headers["x-request-id"]
    return answer.status_code, problem["code"]


def figure(client: httpx.Client, name: str, **labels: str) -> float:
    "A figure of /metrics; the sum where several fit. 0 where there is none."
    total = 0.0
    for line in client.get("/metrics").text.splitlines():
        found = re.fullmatch(rf"{name}(?:{{(.*)}})? ([\d.e+-]+)", line)
        if found and all(f'{k}="{v}"' in (found[1] or "") for k, v in labels.items()):
            total += float(found[2])
    return total


# ------------------------------------------------------------------------------------------------ models that change


def publish(home: Path, version: str) -> Path:
    "A version of the tiny model where the registry publishes them."
    folder = tiny_model(home / "models/tiny" / version)
    about = read_json(folder / "model.json")
    write_json(folder / "model.json", about | {"version": version})
    return folder


def point(home: Path, role: str, version: str) -> None:
    write_json(home / "models" / f"{role}.json", {"model": f"tiny/{version}"})


SERVE = "from celestial_ml.serve.server import serve; serve(None, port=0)"


@pytest.fixture
def registry(tmp_path: Path):
    "A server of the champion, whoever that is: its state folder and its URL."
    home = tmp_path / "home"
    publish(home, "1")
    point(home, "champion", "1")
    with running(None, tmp_path / "log", serve=SERVE, reload_seconds=0.05) as url:
        with httpx.Client(base_url=url, timeout=30) as client:
            yield home, client


def test_a_new_champion_takes_over_under_load_and_no_answer_is_lost(registry) -> None:
    home, client = registry
    publish(home, "2")
    stop, content = time.monotonic() + 4, neptune()

    def ask(_: int) -> Counter:
        seen: Counter = Counter()
        with httpx.Client(base_url=client.base_url, timeout=30) as mine:
            while time.monotonic() < stop:
                answer = send(mine, content)
                seen[answer.status_code, answer.json().get("model_version")] += 1
        return seen

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, i) for i in range(4)]
        swaps = 0
        while time.monotonic() < stop - 0.5:
            time.sleep(0.3)
            point(home, "champion", "12"[(swaps + 1) % 2])
            swaps += 1
        seen = sum((one.result() for one in asked), Counter())
    assert set(seen) == {(200, "tiny/1"), (200, "tiny/2")} and min(seen.values()) > 20 and swaps > 5
    assert figure(client, "celestial_model_reloads_total", result="taken") >= 5


@pytest.mark.parametrize("harm", ["another file", "no file", "damaged pointer", "fails its self-test"])
def test_a_bad_champion_is_refused_and_the_old_one_goes_on(registry, harm: str) -> None:
    home, client = registry
    bad = publish(home, "2")
    if harm == "another file":
        (bad / "model.onnx").write_bytes((bad / "model.onnx").read_bytes() + b"x")
    elif harm == "no file":
        (bad / "model.onnx").unlink()
    elif harm == "fails its self-test":
        images = np.full((2, 16, 16, 3), 200, np.uint8)
        wrong = np.full((2, 10), 0.1, np.float32)
        np.savez(bad / "selftest.npz", images=images, probabilities=wrong, ood_score=np.full(2, 55, np.float32))
        about = read_json(bad / "model.json")
        write_json(bad / "model.json", about | {"files": {"selftest.npz": sha256_of(bad / "selftest.npz")}})
    point(home, "champion", "2")
    if harm == "damaged pointer":
        (home / "models/champion.json").write_text("{")
    until(lambda: "refused" in client.get("/ready").json())
    ready = client.get("/ready").json()
    assert ready["status"] == "ready" and ready["model_version"] == "tiny/1" and ready["refused"]
    assert figure(client, "celestial_model_refused", role="champion") == 1
    assert send(client, neptune()).json()["model_version"] == "tiny/1"
    publish(home, "3")
    point(home, "champion", "3")
    until(lambda: client.get("/ready").json() == {"status": "ready", "model_version": "tiny/3"})
    assert figure(client, "celestial_model_refused", role="champion") == 0


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_challenger_gets_its_share_of_requests(tmp_path: Path, mode: str) -> None:
    home = tmp_path / "home"
    for version, role in (("1", "champion"), ("2", "challenger")):
        publish(home, version)
        point(home, role, version)
    with running(None, tmp_path / "log", serve=SERVE, challenger=f"{mode}:0.5") as url:
        with httpx.Client(base_url=url, timeout=30) as client:
            assert client.get("/ready").json()["challenger"] == "tiny/2"
            answers = Counter(send(client, neptune()).json()["model_version"] for _ in range(60))
            if mode == "canary":
                assert answers["tiny/1"] + answers["tiny/2"] == 60 and min(answers.values()) > 10
                assert (
                    figure(client, "celestial_answers_total", role="canary", model_version="tiny/2")
                    == answers["tiny/2"]
                )
            else:
                assert answers == {"tiny/1": 60}, "nobody is answered by a shadow"
                until(lambda: figure(client, "celestial_shadow_answers_total", agrees="true") > 10)
                assert figure(client, "celestial_shadow_answers_total", agrees="false") == 0


# -------------------------------------------------------------------------------------------------- keys and headers


def test_keys_rate_limits_and_logins(tmp_path: Path) -> None:
    (key, entry), (other, second) = new_key("observatory"), new_key("school")
    model = tiny_model(tmp_path / "model")
    settings = {"api_keys": f"{entry},{second}", "rate_limit": "5/minute"}
    with running(model, tmp_path / "log", demo=False, **settings) as url, httpx.Client(base_url=url) as client:
        assert code(send(client, neptune())) == (401, "no_key")
        assert code(send(client, neptune(), **{"X-API-Key": "ck_guess"})) == (401, "no_key")
        assert code(client.get("/metrics")) == (401, "no_key")
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        statuses = [send(client, neptune(), Authorization=f"Bearer {key}").status_code for _ in range(7)]
        assert statuses == [200] * 5 + [429] * 2
        refused = send(client, neptune(), Authorization=f"Bearer {key}")
        assert code(refused) == (429, "too_many_requests") and int(refused.headers["retry-after"]) >= 1
        assert send(client, neptune(), **{"X-API-Key": other}).status_code == 200, "each key has a rate of its own"
    assert key not in (tmp_path / "log").read_text() and other not in (tmp_path / "log").read_text()


def test_one_rate_for_all_routes(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    with running(model, tmp_path / "log", demo=False, rate_limit="3/hour") as url, httpx.Client(base_url=url) as client:
        asked = [send(client, neptune()), client.get("/model"), send(client, neptune())]
        assert [answer.status_code for answer in asked] == [200] * 3
        assert code(client.get("/model")) == code(send(client, neptune())) == (429, "too_many_requests")


def test_the_demo_requires_its_login(tmp_path: Path) -> None:
    kept = password_hash("per aspera")
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", demo_login=f"anna:{kept}") as url:
        with httpx.Client(base_url=url, timeout=30, follow_redirects=True) as client:
            wrong = client.post("/login", data={"username": "anna", "password": "ad astra"})
            assert wrong.status_code == 400, wrong.text
            assert client.get("/gradio_api/info").status_code == 401
            assert client.post("/login", data={"username": "anna", "password": "per aspera"}).status_code == 200
            assert client.get("/gradio_api/info").status_code == 200


def test_security_headers_are_set_and_other_origins_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    ask = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    with running(model, tmp_path / "log", demo=False) as url, httpx.Client(base_url=url) as client:
        answer = send(client, neptune())
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in client.options("/predict", headers=ask).headers
    with running(model, tmp_path / "log", demo=False, cors_origins="https://elsewhere.example") as url:
        with httpx.Client(base_url=url) as client:
            allowed = client.options("/predict", headers=ask)
            assert allowed.headers["access-control-allow-origin"] == "https://elsewhere.example"
            assert send(client, neptune(), Origin="https://elsewhere.example").json()["label"] == "Neptune"


def test_invalid_settings_are_named(tmp_path: Path) -> None:
    serve = [str(Path(sys.executable).with_name("celestial")), "serve", "--model", str(tiny_model(tmp_path / "m"))]
    for name, value, words in (
        ("CELESTIAL_SERVE_WATING", "3", "Did you mean CELESTIAL_SERVE_WAITING?"),
        ("CELESTIAL_SERVE_WAITING", "many", "CELESTIAL_SERVE_WAITING: "),
        ("CELESTIAL_SERVE_API_KEYS", "no-hash", "NAME:HASH"),
    ):
        result = subprocess.run(serve, env=os.environ | {name: value}, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


# --------------------------------------------------------------------------------------------- overload and bad luck


def slow_picture() -> bytes:
    "A picture that takes a good part of a second to decode."
    return encoded(Image.effect_noise((5000, 5000), 60).convert("RGB"), "JPEG", quality=90)


def test_requests_beyond_the_queue_get_503_and_retry_after(tmp_path: Path) -> None:
    model, content = tiny_model(tmp_path / "model"), slow_picture()
    with running(model, tmp_path / "log", demo=False, waiting=2, max_bytes=60_000_000) as url:
        with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=url, timeout=60) as client:
            answers = list(pool.map(lambda _: send(client, content), range(8)))
            statuses = Counter(answer.status_code for answer in answers)
            assert set(statuses) == {200, 503} and statuses[200] >= 2
            refused = next(answer for answer in answers if answer.status_code == 503)
            assert code(refused) == (503, "busy") and refused.headers["retry-after"] == "1"
            assert send(client, neptune()).status_code == 200, "and it goes on"


def test_a_huge_picture_does_not_delay_others(tmp_path: Path) -> None:
    model, content = tiny_model(tmp_path / "model"), slow_picture()
    with running(model, tmp_path / "log", demo=False, max_bytes=60_000_000) as url:
        with ThreadPoolExecutor(3) as pool, httpx.Client(base_url=url, timeout=60) as client:
            send(client, neptune())
            large = [pool.submit(send, client, content) for _ in range(3)]
            small = 0
            while not all(one.done() for one in large):
                assert send(client, neptune()).status_code == 200
                small += 1
            assert all(one.result().status_code == 200 for one in large) and small > 10


def head(length: int) -> bytes:
    return (
        "POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def test_slow_and_vanishing_clients_cost_nothing(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    with running(model, tmp_path / "log", demo=False, body_seconds=1) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with httpx.Client(base_url=url, timeout=30) as client:
            slow = [socket.create_connection(address) for _ in range(50)]
            for one in slow:
                one.sendall(head(100_000) + b"--b\r\n")
            for _ in range(50):  # these go in the middle of a body, without a word
                gone = socket.create_connection(address)
                gone.sendall(head(100_000) + b"--b\r\nContent-Disposition")
                gone.close()
            assert send(client, neptune()).status_code == 200, "the others are answered meanwhile"
            for one in slow:
                one.settimeout(20)
                assert one.recv(4096).startswith(b"HTTP/1.1 408")
                one.close()
            until(lambda: figure(client, "celestial_in_flight") <= 1)
            assert figure(client, "celestial_requests_total", status="408") == 50
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_asked_to_stop_it_finishes_what_it_has_taken(tmp_path: Path) -> None:
    model, content = tiny_model(tmp_path / "model"), slow_picture()
    command = f"from celestial_ml.serve.server import serve; serve({str(model)!r}, port=0)"
    env = os.environ | {"CELESTIAL_HOME": str(tmp_path / "home"), "CELESTIAL_SERVE_BODY_MEMORY": "240000000"}
    env["CELESTIAL_SERVE_MAX_BYTES"] = "60000000"
    env["CELESTIAL_SERVE_PATIENCE"] = "60"  # a busy machine is slow with such pictures
    process = subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    line = ""
    while "curl" not in line:
        line = process.stdout.readline()
    url = re.search(r"http://[\d.:]+", line).group()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(httpx.post, f"{url}/predict", files={"image": content}, timeout=60) for _ in range(4)]
        until(lambda: "celestial_waiting 4.0" in httpx.get(f"{url}/metrics", timeout=60).text)
        process.send_signal(signal.SIGTERM)
        assert [one.result().status_code for one in asked] == [200] * 4
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Stopped." in out
    lines = [json.loads(line) for line in err.splitlines()]
    answered = [line for line in lines if line.get("path") == "/predict" and line["status"] == 200]
    assert len(answered) == 4
    assert {"time", "level", "request_id", "ms", "label", "model_version"} <= answered[-1].keys()


# ------------------------------------------------------------------------------------------------------------ fuzzing


def malformed(seed: int) -> bytes:
    "An image file that somebody harmed; a seed always harms in the same way."
    chance = random.Random(seed)
    content = bytearray(neptune(chance.choice(["JPEG", "PNG", "WEBP"])))
    harm = chance.randrange(7)
    if harm == 0:
        del content[chance.randrange(1, len(content)) :]
    elif harm == 1:
        for _ in range(chance.randrange(1, 60)):
            content[chance.randrange(len(content))] = chance.randrange(256)
    elif harm == 2:
        start = chance.randrange(len(content))
        del content[start : start + chance.randrange(1, 400)]
    elif harm == 3:  # sizes that were never meant: the fields of a head are within the first bytes
        at = chance.randrange(8, 40)
        content[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00"])
    elif harm == 4:
        content[chance.randrange(20) : 0] = chance.randbytes(chance.randrange(1, 4000))
    elif harm == 5:
        content += chance.choice([b"PK\x03\x04" + bytes(40) + b"PK\x05\x06" + bytes(18), b"<script>x</script>"])
    else:
        content = bytearray(chance.randbytes(chance.randrange(0, 3000)))
    return bytes(content)


@pytest.mark.parametrize("uploads", [250, pytest.param(3000, marks=pytest.mark.slow)])
def test_malformed_uploads_are_client_errors(tmp_path: Path, uploads: int) -> None:
    model = tiny_model(tmp_path / "model")
    with running(model, tmp_path / "log", demo=False) as url, httpx.Client(base_url=url, timeout=60) as client:
        pid = int(figure(client, "celestial_process_id"))
        for seed in range(uploads):  # once to fill what is kept for good: the sizes of memory, the counters
            send(client, malformed(seed))
        before, statuses = resident_mb(pid), Counter()
        for seed in range(uploads):
            answer = send(client, malformed(seed))
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (seed, answer.text)
            if answer.status_code != 200:
                code(answer)
        for seed in range(100):  # and forms that are broken, not the pictures in them
            body = bytearray(b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx\r\n--b--\r\n')
            chance = random.Random(seed)
            for _ in range(chance.randrange(1, 6)):
                body[chance.randrange(len(body))] = chance.randrange(256)
            kind = {"content-type": "multipart/form-data; boundary=b"}
            assert 400 <= client.post("/predict", content=bytes(body), headers=kind).status_code < 500, seed
        assert min(statuses[400], statuses[415]) > uploads / 6, statuses
        assert resident_mb(pid) - before < 20, "memory stays flat"
        assert send(client, neptune()).json()["label"] == "Neptune"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_picture_that_is_something_else_as_well(tmp_path: Path) -> None:
    with running(tiny_model(tmp_path / "m"), tmp_path / "log", demo=False) as url, httpx.Client(base_url=url) as client:
        for hidden in (b"<script>alert(1)</script>", b"PK\x03\x04" + bytes(30) + b"PK\x05\x06" + bytes(18)):
            assert code(send(client, neptune() + hidden)) == (415, "polyglot")
            assert code(client.post("/explain", files={"image": neptune() + hidden})) == (415, "polyglot")


def test_several_at_once(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    with running(model, tmp_path / "log", demo=False, max_files=3) as url, httpx.Client(base_url=url) as client:
        files = [
            ("images", ("n.png", neptune())),
            ("images", ("m.jpg", encoded(render("Mars"), "JPEG"))),
            ("images", ("b", b"x")),
        ]
        answer = client.post("/predict/batch", files=files).json()
        assert [one.get("label") for one in answer["answers"]] == ["Neptune", "Mars", None]
        assert answer["answers"][2]["error"]["code"] == "not_an_image" and answer["answers"][1]["file"] == "m.jpg"
        assert [one.get("request_id") for one in answer["answers"][:2]] == [
            f"{answer['request_id']}.{i}" for i in (0, 1)
        ]
        assert code(client.post("/predict/batch", files=[*files, files[0]])) == (413, "too_many_files")
        assert code(client.post("/predict/batch", files={"image": neptune()})) == (422, "no_image")


def test_refusals_are_counted_by_their_code(tmp_path: Path) -> None:
    with running(tiny_model(tmp_path / "m"), tmp_path / "log", demo=False) as url, httpx.Client(base_url=url) as client:
        send(client, b"x")
        client.post("/predict/batch", files=[("images", b"x"), ("images", neptune())])
        client.get("/nothing")
        assert figure(client, "celestial_refusals_total", code="not_an_image") == 2
        assert figure(client, "celestial_refusals_total", code="not_found") == 1
        client.post("/explain", files={"image": neptune()})
        assert figure(client, "celestial_answers_total", label="Neptune") == 2, "an explained picture is answered too"


def test_operations_page_names_every_figure_and_every_setting(tmp_path: Path) -> None:
    page = (ROOT / "nbs/operations.md").read_text()
    rows = {
        row for row in re.findall(r"^\| `(\w+)`", page, re.MULTILINE) if row.isupper() or row.startswith("celestial_")
    }
    with running(tiny_model(tmp_path / "m"), tmp_path / "log", demo=False) as url, httpx.Client(base_url=url) as client:
        send(client, neptune())
        text = client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (celestial_\w+) (\w+)$", text, re.MULTILINE))
    figures = {name for name in kinds if not name.endswith("_created")}
    settings = {name.upper() for name in ServeSettings.model_fields}
    of_the_demo = {"celestial_upload_bytes", "celestial_upload_files"}
    of_the_monitor = {row for row in rows if re.match("celestial_(alert|monitor_)", row)}  # tests/test_prometheus.py
    assert figures | of_the_demo | of_the_monitor | settings == rows


def test_the_openapi_document_is_kept(tmp_path: Path) -> None:
    "schemathesis asks whatever the document allows, and much that it doesn't."
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", demo=False) as url:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"]
        env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "SCHEMATHESIS_HOOKS": "openapi_hooks"}
        # A JSON schema can't say that a tensor's shape fits its data, so much that it allows is refused.
        tensors = 'include-path-regex = "/infer$"\nchecks.positive_data_acceptance.enabled = false'
        (tmp_path / "schemathesis.toml").write_text(f"[[operations]]\n{tensors}\n")
        result = subprocess.run(
            [*command, "--max-examples", "25", "--seed", "1", "--no-color"],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert "Traceback" not in (tmp_path / "log").read_text()
