"""The HTTP contract, held by a real server: every answer has its status and its form, whatever comes in."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import httpx
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from serving import encoded, neptune, running, tiny_model

from celestial_ml.core.files import read_json, write_json
from celestial_ml.data.images import decode_image
from celestial_ml.package.folder import ModelError
from celestial_ml.planets.renderer import render
from celestial_ml.serve.predictor import Predictor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def client(model, log):
    with running(model, log) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def send(client, content, name="picture.png", kind="image/png"):
    return client.post("/predict", files={"image": (name, content, kind)})


def problem(answer):
    "The status and code of an error, after checking its form."
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message", "hint"}
    assert body["error"]["message"] and body["error"]["hint"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] and "Traceback" not in answer.text
    return answer.status_code, body["error"]["code"]


def rotated():
    "A portrait held sideways, with the orientation that puts it upright."
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.rot90(render("Neptune")).copy(), "JPEG", exif=exif)


GOOD = {
    "jpeg": lambda: neptune("JPEG"),
    "png": lambda: neptune("PNG"),
    "webp": lambda: neptune("WEBP"),
    "cmyk": lambda: encoded(Image.fromarray(render("Neptune")).convert("CMYK"), "JPEG"),
    "16-bit": lambda: encoded(np.full((32, 32), 40000, np.uint16)),
    "grayscale": lambda: encoded(Image.fromarray(render("Moon")).convert("L")),
    "alpha": lambda: encoded(Image.fromarray(render("Neptune")).convert("RGBA")),
    "palette": lambda: encoded(Image.fromarray(render("Neptune")).convert("P")),
    "exif-rotated": rotated,
    "not square": lambda: encoded(render("Neptune")[30:80]),
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_pictures(client, kind):
    answer = send(client, GOOD[kind]())
    body = answer.json()
    assert answer.status_code == 200, body
    assert body["request_id"] == answer.headers["x-request-id"]
    assert set(body) == {
        *("label", "confidence", "known", "ood_score", "probabilities"),
        *("model_version", "sha256", "request_id"),
    }
    assert body["model_version"] == "tiny/7" and abs(sum(body["probabilities"].values()) - 1) < 1e-5
    assert body["label"] == max(body["probabilities"], key=body["probabilities"].get)
    if kind not in ("16-bit", "grayscale"):
        assert body["label"] == "Neptune" and body["known"]


@pytest.mark.parametrize("kind", ["png", "grayscale", "not square"])
def test_an_explained_answer_is_the_answer_with_its_reasons(client, kind):
    content = GOOD[kind]()
    answer, why = (client.post(path, files={"image": content}).json() for path in ("/predict", "/explain"))
    reasons = {name: why.pop(name) for name in ("saliency", "overlay", "looks_like")}
    assert why | {"request_id": ""} == answer | {"request_id": ""}
    saliency = reasons["saliency"]
    values = np.array(saliency["values"])
    assert values.shape == (saliency["rows"], saliency["columns"]) and values.min() >= 0 and values.max() <= 1
    width, height = Image.open(io.BytesIO(content)).size
    assert saliency["columns"] == 9 and abs(saliency["rows"] - 9 * height / width) <= 0.5, "square cells"
    picture = decode_image(inside(reasons["overlay"]))
    assert picture.shape[:2] == (height, width)
    similarities = [one["similarity"] for one in reasons["looks_like"]]
    assert len(similarities) == 3 and similarities == sorted(similarities, reverse=True) and similarities[0] > 0.9
    assert all(max(decode_image(inside(one["thumbnail"])).shape) == 96 for one in reasons["looks_like"])
    if kind == "png":
        assert reasons["looks_like"][0]["label"] == "Neptune" and saliency["where"] == "the middle"
        assert values[4, 4] > 0.9 and values[0].max() < 0.3, "the globe, not the sky"
        colourful = np.ptp(picture.astype(int), axis=-1)
        assert colourful[64, 64] > 60 and colourful[:4, :4].max() < 20


def inside(uri):
    "The content of a data URI."
    head, _, content = uri.partition(",")
    assert head == "data:image/webp;base64"
    return base64.b64decode(content)


def test_explain_refuses_as_predict_does(client):
    for make, status, code in BAD.values():
        assert problem(client.post("/explain", files={"image": make()})) == (status, code)
    assert problem(client.post("/explain")) == (422, "no_image")
    assert problem(client.get("/explain")) == (405, "method_not_allowed")
    assert problem(client.post("/explain", files={"image": bytes(21_000_000)})) == (413, "too_many_bytes")


def test_an_older_package_explains_without_examples(tmp_path):
    about = read_json(tiny_model(tmp_path) / "model.json")
    del about["files"]
    (tmp_path / "reference.npz").unlink()
    write_json(tmp_path / "model.json", about)
    why = Predictor(tmp_path).explain(neptune())
    assert why.prediction.label == "Neptune" and why.looks_like == () and why.saliency.where == "the middle"


@pytest.mark.parametrize("change", ["replaced", "missing", "elsewhere"])
def test_examples_that_are_not_the_packaged_ones_are_refused(tmp_path, change):
    reference = tiny_model(tmp_path) / "reference.npz"
    if change == "replaced":
        reference.write_bytes(reference.read_bytes()[:-1] + b"!")
    elif change == "missing":
        reference.unlink()
    else:
        about = read_json(tmp_path / "model.json")
        write_json(tmp_path / "model.json", about | {"file": "../model.onnx"})
    with pytest.raises(ModelError):
        Predictor(tmp_path)


def test_model_json_names_the_file_that_is_served(tmp_path):
    about = read_json(tiny_model(tmp_path) / "model.json")
    (tmp_path / "model.onnx").rename(tmp_path / "model.int8.onnx")
    (tmp_path / "model.onnx").write_bytes(b"not the one that is served")
    write_json(tmp_path / "model.json", about | {"file": "model.int8.onnx"})
    assert Predictor(tmp_path).predict(neptune()).label == "Neptune"


def noise(width, height):
    "A picture that doesn't compress."
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def animated(kind):
    frames = [Image.fromarray(noise(32, 32)), Image.fromarray(noise(32, 32)[::-1].copy())]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


BAD = {
    "zero bytes": (lambda: b"", 400, "empty"),
    "a text named .jpg": (lambda: b"Dear planet, how are you?", 415, "not_an_image"),
    "a GIF": (lambda: encoded(render("Mars"), "GIF"), 415, "not_an_image"),
    "truncated PNG": (lambda: neptune("PNG")[:3000], 400, "damaged"),
    "truncated JPEG": (lambda: neptune("JPEG")[:1500], 400, "damaged"),
    "corrupt PNG": (lambda: neptune("PNG")[:200] + bytes(500) + neptune("PNG")[700:], 400, "damaged"),
    "1 px": (lambda: encoded(np.zeros((1, 1, 3), np.uint8)), 400, "too_small"),
    "20,000 px": (lambda: encoded(Image.new("1", (20_000, 20_000))), 413, "too_large"),
    "animated PNG": (lambda: animated("PNG"), 400, "animated"),
    "animated WebP": (lambda: animated("WEBP"), 400, "animated"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures(client, kind):
    make, status, code = BAD[kind]
    assert problem(send(client, make(), "picture.jpg", "image/jpeg")) == (status, code)


def test_missing_field(client):
    answer = client.post("/predict", files={"photo": neptune()})
    assert problem(answer) == (422, "no_image")
    assert "'image'" in answer.json()["error"]["message"]
    assert problem(client.post("/predict")) == (422, "no_image")
    assert problem(client.post("/predict", data={"image": "words, no file"})) == (422, "no_image")
    assert problem(client.post("/predict", content=neptune(), headers={"content-type": "image/png"})) == (
        422,
        "no_image",
    )


def test_broken_form(client):
    answer = client.post("/predict", content=b"--x", headers={"content-type": "multipart/form-data"})
    assert problem(answer) == (400, "bad_request")


def test_wrong_method(client):
    answer = client.get("/predict")
    assert problem(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert problem(client.post("/health")) == (405, "method_not_allowed")


def test_unknown_path(client):
    for path in ("/nowhere", "/predict/nowhere", "/docs/static/nowhere.js", "/static/../../etc/passwd", "/assets/x.js"):
        assert problem(client.get(path)) == (404, "not_found")


def test_too_many_bytes(client):
    content = bytes(21_000_000)
    assert problem(send(client, content)) == (413, "too_many_bytes")

    def trickle():  # no Content-Length: only counting helps
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for start in range(0, len(content), 1_000_000):
            yield content[start : start + 1_000_000]

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert problem(client.post("/predict", content=trickle(), headers=headers)) == (413, "too_many_bytes")
    assert send(client, neptune()).status_code == 200  # and it lives on


def test_health_ready_model(client):
    assert client.get("/health").json()["status"] == "alive"
    assert client.get("/ready").json() == {"status": "ready", "model_version": "tiny/7"}
    about = client.get("/model").json()
    assert about["version"] == "7" and len(about["classes"]) == 10 and about["metrics"]["images"] == 600


def test_docs_need_no_internet(client):
    page = client.get("/docs").text
    assert "https://" not in page and "http://" not in page
    for path in ("/docs/static/swagger-ui-bundle.js", "/docs/static/swagger-ui.css", "/docs/static/favicon.png"):
        assert path in page and client.get(path).status_code == 200


def test_openapi_describes_errors_and_examples(client):
    document = client.get("/openapi.json").json()
    predict = document["paths"]["/predict"]["post"]["responses"]
    assert set(predict) == {"200", "400", "401", "408", "413", "415", "422", "429", "503"}
    for status in set(predict) - {"200"}:
        content = predict[status]["content"]["application/json"]
        assert content["schema"]["$ref"].endswith("/ErrorForm")
        assert all(
            set(example["value"]["error"]) == {"code", "message", "hint"} for example in content["examples"].values()
        )
    schemas = document["components"]["schemas"]
    assert schemas["Answer"]["example"]["label"] == schemas["Explained"]["example"]["label"] == "Saturn"
    assert document["paths"]["/explain"]["post"]["responses"].keys() == predict.keys()
    assert {"saliency", "overlay", "looks_like"} <= schemas["Explained"]["example"].keys()


def test_demo_answers_at_root(client):
    page = client.get("/")
    assert page.status_code == 200 and "<gradio-app" in page.text and "Which world is this?" in page.text
    assert "googleapis" not in page.text


def test_nothing_went_wrong_in_the_log(client, log):
    assert client.get("/health").status_code == 200  # ran last: everything above is in the log by now
    assert "Traceback" not in log.read_text()


def test_alive_but_not_ready_without_a_model(tmp_path):
    with running(None, tmp_path / "log", demo=False) as url, httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        for answer in (client.get("/ready"), client.get("/model"), send(client, neptune())):
            assert problem(answer) == (503, "no_model")
        assert problem(client.get("/")) == (404, "not_found")


def test_concurrent_answers_are_right(client):
    from concurrent.futures import ThreadPoolExecutor

    files = {body: encoded(render(body)) for body in ("Mars", "Neptune")}
    wanted = ["Mars", "Neptune"] * 20
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: send(client, files[body]).json(), wanted))
    assert [answer["label"] for answer in answers] == wanted
    assert len({answer["request_id"] for answer in answers}) == len(wanted)


def python(code, **options):
    "What a fresh interpreter says to `code`."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)


def test_serving_is_light(model, tmp_path):
    (tmp_path / "picture.png").write_bytes(neptune())
    code = f"""
import json, sys
from fastapi.testclient import TestClient
from celestial_ml.serve.api import build_app
client = TestClient(build_app({str(model)!r}))
for path in ("/predict", "/explain"):
    answer = client.post(path, files={{"image": open({str(tmp_path / "picture.png")!r}, "rb")}})
    assert answer.json()["label"] == "Neptune"
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
    heavy = {
        "tensorflow",
        "keras",
        "mlflow",
        "ploomber",
        "jupyter",
        "IPython",
        "sklearn",
        "onnx",
        "pandas",
        "matplotlib",
        "scipy",
    }
    assert not (heavy | {"gradio", "papermill", "dvc"}) & set(json.loads(run.stdout))


def test_demo_is_light(model):
    code = f"""
import json, sys
from celestial_ml.demo.routes import add_demo
from celestial_ml.serve.api import build_app
build_app({str(model)!r}, add_demo)
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
    heavy = {"tensorflow", "keras", "mlflow", "ploomber", "jupyter", "sklearn", "onnx", "matplotlib"}
    assert not heavy & set(json.loads(run.stdout.splitlines()[-1]))


def test_serving_needs_only_what_it_requires(model, tmp_path):
    "What `celestial serve` imports is in the dependencies without extras, or in what those require: its image has no more."
    installed, left = set(), list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        if name not in installed and (not requirement.marker or requirement.marker.evaluate()):
            installed.add(name)
            left += [one for one in requires(name) or () if "extra ==" not in one]
    owners = packages_distributions().items()
    absent = [module for module, names in owners if not installed & set(map(canonicalize_name, names))]
    assert {"scipy", "tensorflow"} <= set(absent) and "gradio" not in absent
    code = f"""
import sys
sys.modules |= dict.fromkeys(set({absent!r}) - {{"celestial_ml"}})  # importing one of them is an error
from celestial_ml.cli.app import app
from celestial_ml.monitor.log import service_log
from celestial_ml.reports.health import add_whole_demo
from celestial_ml.serve.api import build_app
from celestial_ml.serve.settings import ServeSettings
build_app({str(model)!r}, add_whole_demo, log=service_log(ServeSettings()))
"""
    run = python(code, env=os.environ | {"CELESTIAL_HOME": str(tmp_path)})
    assert run.returncode == 0, run.stderr


def test_port_in_use(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = time.perf_counter()
        run = python(
            "import sys; from celestial_ml.core.errors import CelestialError; from celestial_ml.serve.server import serve\n"
            f"try: serve({str(model)!r}, port={port})\n"
            "except CelestialError as e: print(e, 'gradio' in sys.modules, file=sys.stderr); sys.exit(e.exit_code)"
        )
    assert run.returncode == 2
    assert f"port {port} is in use" in run.stderr and f"--port {port + 1}" in run.stderr
    assert run.stderr.strip().endswith("False"), "it loaded the demo before it looked at the port"
    assert time.perf_counter() - started < 30


def test_interrupt_ends_quietly(model):
    code = f"from celestial_ml.serve.server import serve; serve({str(model)!r}, port=0)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, env=os.environ)
    line = process.stdout.readline()
    while "curl" not in line:
        line = process.stdout.readline()
        assert line, process.stderr.read()
    time.sleep(0.5)  # the greeting comes just before the signal handler
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert all(json.loads(line)["level"] == "INFO" for line in err.splitlines()), err
    assert "Stopped." in out


def test_a_missing_model_is_an_error(tmp_path):
    from celestial_ml.package.folder import ModelError
    from celestial_ml.serve.server import serve

    with pytest.raises(ModelError, match=r"no model\.json"):
        serve(Path(tmp_path), port=0)
