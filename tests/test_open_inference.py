"""The Open Inference Protocol beside the API: the published document, malformed requests, and a real client.

`reference/open_inference.json` is the protocol's OpenAPI document as MLServer 1.7.1 publishes it
(`mlserver/rest/openapi/dataplane.json` of its wheel, unchanged; Apache License 2.0, Seldon Technologies Ltd.).
"""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import jsonschema
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving import encoded, neptune, running

from celestial_ml.core.files import read_json
from celestial_ml.core.testing import colour_model
from celestial_ml.monitor.log import open_log
from celestial_ml.monitor.records import last_answers
from celestial_ml.planets.renderer import render
from celestial_ml.serve.api import build_app
from celestial_ml.serve.settings import ServeSettings, new_key

PUBLISHED = read_json(Path(__file__).parent / "reference" / "open_inference.json")
SCHEMAS = PUBLISHED["components"]["schemas"] | {"TensorData": {"type": "array"}}  # its `bytes` is not a type of JSON
INFER = "/v2/models/tiny/infer"
OUTPUTS = ["probabilities", "label", "known", "ood_score"]


@pytest.fixture(scope="module")
def client(model, log):
    with running(model, log, demo=False, log_url="off") as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def check(name, content):
    "Hold a value against a form of the published document."
    document = {"$ref": f"#/components/schemas/{name}", "components": PUBLISHED["components"] | {"schemas": SCHEMAS}}
    jsonschema.Draft202012Validator(document).validate(content)


def refusal(answer):
    "The status of an error in the protocol's form."
    assert set(answer.json()) == {"error"} and isinstance(answer.json()["error"], str) and answer.json()["error"]
    check("InferenceErrorResponse", answer.json())
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]
    assert "Traceback" not in answer.text and 400 <= answer.status_code < 600
    return answer.status_code


def files(*contents, **changes):
    "An input of image files."
    data = [base64.b64encode(content).decode() for content in contents]
    return {"name": "image", "datatype": "BYTES", "shape": [len(contents)], "data": data} | changes


def pixels(images, **changes):
    "An input of pixels."
    return {"name": "image", "datatype": "UINT8", "shape": images.shape, "data": images.ravel().tolist()} | changes


def ask(client, tensor, path=INFER, **more):
    return client.post(path, json={"inputs": [tensor]} | more)


def binary(client, tensor, content, path=INFER, length=None, **more):
    "A request of the binary extension."
    head = json.dumps({"inputs": [tensor]} | more).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)) if length is None else length}
    return client.post(path, content=head + content, headers=headers)


def values(answer):
    "The outputs by name, whichever way they came."
    assert answer.status_code == 200, answer.text
    at = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    content, found = json.loads(answer.content[:at]), {}
    check("InferenceResponse", content | {"outputs": [{"data": []} | one for one in content["outputs"]]})
    for one in content["outputs"]:
        size = one.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[one["name"]] = np.array(one["data"]).reshape(one["shape"]).tolist()
            continue
        part, at = answer.content[at : at + size], at + size
        assert len(part) == size
        if one["datatype"] == "BYTES":
            texts = []
            while part:
                length = int.from_bytes(part[:4], "little")
                texts, part = [*texts, part[4 : 4 + length].decode()], part[4 + length :]
            found[one["name"]] = np.array(texts).reshape(one["shape"]).tolist()
        else:
            kind = {"FP32": "<f4", "BOOL": bool}[one["datatype"]]
            found[one["name"]] = np.frombuffer(part, kind).reshape(one["shape"]).tolist()
    assert at == len(answer.content)
    return found


# ------------------------------------------------------------------------------------------- the published document


def test_every_route_of_the_published_document_answers_in_its_form(client):
    ours = client.get("/openapi.json").json()["paths"]
    streams = ("_stream", "/generate")  # of MLServer, for language models; not of the protocol
    for path, operations in PUBLISHED["paths"].items():
        if path.endswith(streams):
            continue
        own = path.replace("{model_name}", "{name}").replace("{model_version}", "{version}")
        at = own.replace("{name}", "tiny").replace("{version}", "7")
        for method in set(operations) & {"get", "post"}:
            assert method in ours[own]
            answer = ask(client, files(neptune()), at) if method == "post" else client.get(at)
            assert answer.status_code == 200, (path, answer.text)
            described = operations[method]["responses"]["200"].get("content", {}).get("application/json")
            if described:
                check(described["schema"]["$ref"].rpartition("/")[2], answer.json())
    assert client.get("/v2/", follow_redirects=True).json() == client.get("/v2").json()


def test_metadata_describes_what_is_answered(client):
    metadata = client.get("/v2/models/tiny").json()
    assert (metadata["name"], metadata["versions"]) == ("tiny", ["7"])
    answer = ask(client, files(neptune(), encoded(render("Mars"))), id="42").json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("tiny", "7", "42")
    assert [one["name"] for one in answer["outputs"]] == [one["name"] for one in metadata["outputs"]] == OUTPUTS
    for one, described in zip(answer["outputs"], metadata["outputs"], strict=True):
        assert one["datatype"] == described["datatype"]
        assert [a if b < 0 else b for a, b in zip(one["shape"], described["shape"], strict=True)] == one["shape"]


def test_without_a_model_it_is_alive_but_not_ready(tmp_path, monkeypatch):
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path))
    with TestClient(build_app(None)) as client:
        assert client.get("/v2/health/live").status_code == client.get("/v2").status_code == 200
        assert refusal(client.get("/v2/health/ready")) == refusal(client.get("/v2/models/tiny/ready")) == 503
        assert refusal(ask(client, files(neptune()))) == 503


# ------------------------------------------------------------------------------------------------------ the answers


def test_all_ways_give_the_answer_of_predict(client):
    images = np.stack([render("Neptune"), render("Mars")])
    contents = [encoded(image) for image in images]
    expected = [client.post("/predict", files={"image": content}).json() for content in contents]
    elements = b"".join(len(one).to_bytes(4, "little") + one for one in contents)
    size = {"parameters": {"binary_data_size": images.nbytes}}
    without = [
        {name: value for name, value in one.items() if name != "data"} for one in (files(*contents), pixels(images))
    ]
    answers = [
        ask(client, files(*contents)),
        ask(client, files(*contents, shape=[2, 1], data=[[one] for one in files(*contents)["data"]])),
        ask(client, pixels(images)),
        ask(client, pixels(images, data=images.tolist())),
        ask(client, pixels(images), parameters={"binary_data_output": True}),
        binary(client, without[0] | {"parameters": {"binary_data_size": len(elements)}}, elements),
        binary(client, without[1] | size, images.tobytes(), parameters={"binary_data_output": True}),
    ]
    for answer in answers:
        found = values(answer)
        assert found["label"] == ["Neptune", "Mars"] == [one["label"] for one in expected]
        assert found["known"] == [one["known"] for one in expected]
        assert np.allclose(found["ood_score"], [one["ood_score"] for one in expected], atol=1e-3)
        assert np.allclose(found["probabilities"], [list(one["probabilities"].values()) for one in expected], atol=1e-6)


def test_a_large_tensor_goes_the_way_of_a_large_picture(client):
    image = np.asarray(Image.fromarray(render("Neptune")).resize((2400, 900)))[None]
    tensor = {"name": "image", "datatype": "UINT8", "shape": image.shape}
    answer = binary(client, tensor | {"parameters": {"binary_data_size": image.nbytes}}, image.tobytes())
    expected = client.post("/predict", files={"image": encoded(image[0])}).json()
    assert np.allclose(values(answer)["probabilities"][0], list(expected["probabilities"].values()), atol=1e-6)


def test_outputs_are_as_requested(client):
    best = [{"name": "probabilities", "parameters": {"classification": 2}}, {"name": "label"}]
    found = values(ask(client, files(neptune()), outputs=best))
    assert list(found) == ["probabilities", "label"] and len(found["probabilities"][0]) == 2
    value, index, label = found["probabilities"][0][0].split(":")
    assert label == "Neptune" and float(value) > 0.5
    assert client.get("/model").json()["classes"][int(index)] == label
    mixed = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "known"}]
    assert values(ask(client, files(neptune()), outputs=mixed)) == {"label": ["Neptune"], "known": [True]}
    off = [{"name": "label", "parameters": {"binary_data": False}}]
    answer = ask(client, files(neptune()), outputs=off, parameters={"binary_data_output": True})
    assert answer.headers["content-type"] == "application/json" and "id" not in answer.json()
    assert answer.json()["parameters"] == {"request_id": answer.headers["x-request-id"]}


# ------------------------------------------------------------------------------------------------ malformed requests

TWO = np.zeros((2, 8, 8, 3), np.uint8)
SIZE = {"parameters": {"binary_data_size": TWO.nbytes}}
BARE = {"name": "image", "datatype": "UINT8", "shape": TWO.shape}
WRONG = {
    "too few values": (pixels(TWO, data=[0] * 5), 400),
    "too many values": (pixels(TWO, data=[0] * 1000), 400),
    "nested in another shape": (pixels(TWO, data=TWO.reshape(8, 8, 2, 3).tolist()), 400),
    "ragged": (pixels(TWO, data=[[[0] * 3], [0]]), 400),
    "above a byte": (pixels(TWO, data=[256] * TWO.size), 400),
    "below zero": (pixels(TWO, data=[-1] * TWO.size), 400),
    "a fraction": (pixels(TWO, data=[0.5] * TWO.size), 400),
    "texts": (pixels(TWO, data=["0"] * TWO.size), 400),
    "objects": (pixels(TWO, data=[{"a": 1}] * TWO.size), 400),
    "no data": (BARE, 400),
    "data that is not a list": (pixels(TWO, data="AAAA"), 400),
    "another datatype": (pixels(TWO, datatype="FP32"), 400),
    "another name": (pixels(TWO, name="input0"), 400),
    "three dimensions": (pixels(TWO[0]), 400),
    "four channels": (pixels(np.zeros((1, 8, 8, 4), np.uint8)), 400),
    "a negative edge": (pixels(TWO, shape=[-2, 8, 8, 3]), 400),
    "an empty tensor": (pixels(TWO[:0]), 400),
    "a shape of texts": (pixels(TWO, shape=["2", "8", "8", "3"]), 400),
    "a huge shape": (pixels(TWO, shape=[2, 2**31, 2**31, 3]), 400),
    "a shape above all bounds": (pixels(TWO, shape=[10**30, 8, 8, 3]), 400),
    "too many dimensions": (pixels(TWO, shape=[1] * 100), 400),
    "too many pictures": (pixels(np.zeros((33, 8, 8, 3), np.uint8)), 413),
    "too many files": (files(*[b"x"] * 33), 413),
    "too small": (pixels(TWO[:, :4]), 400),
    "no base64": (files(data=["§§§"], shape=[1]), 400),
    "a number for base64": (files(data=[7], shape=[1]), 400),
    "fewer files than the shape": (files(b"x", shape=[2]), 400),
    "no shape": (files(b"x", shape=[]), 415),
    "not an image": (files(b"Dear planet"), 415),
    "one of two damaged": (files(neptune(), neptune()[:2000]), 400),
    "bytes that are not there": (BARE | SIZE, 400),
    "data twice": (pixels(TWO) | SIZE, 400),
    "a negative size": (BARE | {"parameters": {"binary_data_size": -1}}, 400),
    "a size that is a text": (BARE | {"parameters": {"binary_data_size": "384"}}, 400),
    "parameters that are a list": (BARE | {"parameters": [1]}, 400),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tensors(client, kind):
    tensor, status = WRONG[kind]
    assert refusal(ask(client, tensor)) == status


BODIES = {
    "nothing": b"",
    "a list": b"[]",
    "no inputs": b'{"id": "1"}',
    "an empty list of inputs": b'{"inputs": []}',
    "half a document": b'{"inputs": [',
    "not UTF-8": b'{"id": "\xff"}',
    "deeply nested": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": json.dumps({"inputs": [pixels(TWO, data=[float("nan")] * TWO.size)]}).encode(),
    "an endless number": b'{"inputs": [{"shape": [1' + b"0" * 10_000 + b"]}]}",
    "half a character": b'{"id": "\\ud800", "inputs": []}',
    "a number as id": json.dumps({"id": 42, "inputs": [files(b"x")]}).encode(),
    "two inputs": json.dumps({"inputs": [files(b"x")] * 2}).encode(),
    "an unknown output": json.dumps({"inputs": [files(b"x")], "outputs": [{"name": "logits"}]}).encode(),
    "an output without a name": json.dumps({"inputs": [files(b"x")], "outputs": [{}]}).encode(),
    "best none": json.dumps(
        {"inputs": [files(b"x")], "outputs": [{"name": "probabilities", "parameters": {"classification": 0}}]}
    ).encode(),
}


@pytest.mark.parametrize("kind", BODIES)
def test_wrong_documents(client, kind):
    assert refusal(client.post(INFER, content=BODIES[kind])) == (413 if kind == "deeply nested" else 400)


@pytest.mark.parametrize("length", ["", "0", "-1", "1e3", "+5", "99999999", "9" * 400, "5", "١٢"])
def test_wrong_lengths_of_the_head(client, length):
    headers = [(b"inference-header-content-length", length.encode())]
    body = json.dumps({"inputs": [BARE | SIZE]}).encode() + TWO.tobytes()
    assert refusal(client.post(INFER, content=body, headers=headers)) == 400


def test_wrong_binary_data(client):
    files_of = {"name": "image", "datatype": "BYTES", "shape": [1]}
    for content in (b"", b"\x01", b"\xff\xff\xff\xffabc", b"\x03\0\0\0abcd", b"\x04\0\0\0abc"):
        assert refusal(binary(client, files_of | {"parameters": {"binary_data_size": len(content)}}, content)) == 400
    assert refusal(binary(client, BARE | {"parameters": {"binary_data_size": 10}}, TWO.tobytes())) == 400
    assert refusal(binary(client, BARE | {"parameters": {"binary_data_size": 10}}, bytes(10))) == 400
    assert refusal(binary(client, pixels(TWO), b"more")) == 400, "bytes that belong to no input"
    assert refusal(binary(client, files_of | {"parameters": {"binary_data_size": 4}}, bytes(4))) == 400, "an empty file"


def test_other_models_versions_paths_and_methods(client):
    for name in ("other", "tiny/versions/8", "tiny/versions/champion", "%2e%2e", "tiny%00"):
        assert refusal(ask(client, files(neptune()), f"/v2/models/{name}/infer")) in (400, 404)
        assert refusal(client.get(f"/v2/models/{name}")) in (400, 404)
        assert refusal(client.get(f"/v2/models/{name}/ready")) in (400, 404)
    assert refusal(client.get("/v2/nothing")) == refusal(client.get("/v2/models")) == 404
    assert refusal(client.get(INFER)) == refusal(client.post("/v2")) == 405


COSTLY = {  # each would hold up the event loop
    "lists": b"[" * 99_999,
    "lists in lists": (b"[" * 20 + b"]" * 20 + b",") * 9_999,
    "objects": b'{"a":{}},' * 9_999,
    "keys": b"{%s}" % b",".join(b'"%d":1' % i for i in range(9_999)),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_costly_documents_are_refused_before_they_are_parsed(client, kind):
    assert refusal(client.post(INFER, content=b'{"inputs":[%s]}' % COSTLY[kind])) == 413


def test_many_numbers_are_refused_before_they_are_parsed(client):
    tensor = pixels(np.zeros((1, 400, 400, 3), np.uint8))
    assert refusal(ask(client, tensor)) == 413
    nested = pixels(np.zeros((1, 256, 256, 3), np.uint8), data=np.zeros((1, 256, 256, 3), int).tolist())
    assert ask(client, nested).status_code == 200
    assert refusal(client.post(INFER, content=bytes(21_000_000))) == 413


# ---------------------------------------------------------------------------------------------- guard, log, metrics


def test_guard_log_and_metrics_are_those_of_predict(model, tmp_path, monkeypatch):
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path))
    key, entry = new_key("kserve")
    settings = ServeSettings(api_keys=entry, rate_limit="5/minute")
    log = open_log()
    with TestClient(build_app(model, settings=settings, log=log)) as client:
        assert refusal(ask(client, files(neptune()))) == refusal(client.get("/v2/models/tiny")) == 401
        assert client.get("/v2/health/ready").status_code == 200, "a probe has no key"
        client.headers["Authorization"] = f"Bearer {key}"
        answer = ask(client, files(neptune(), encoded(render("Mars"))))
        number = answer.json()["parameters"]["request_id"]
        single = ask(client, pixels(render("Mars")[None, ::2, ::2])).json()["parameters"]["request_id"]
        page = client.get("/metrics").text
        assert 'celestial_requests_total{route="/v2/infer",status="200"} 2.0' in page
        assert 'celestial_answers_total{known="true",label="Mars",model_version="tiny/7",role="champion"} 2.0' in page
        assert ask(client, files(b"x")).status_code == 415 and client.get("/v2/models/tiny").status_code == 200
        assert refusal(ask(client, files(neptune()))) == 429
        log.flush()
        rows = {row["request_id"]: row for row in last_answers()}
        assert set(rows) == {f"{number}.0", f"{number}.1", single}
        assert rows[f"{number}.0"]["label"] == "Neptune" and rows[single]["label"] == "Mars"
        assert (rows[single]["width"], rows[single]["format"]) == (render("Mars").shape[1] // 2, "PNG")
    log.close()


def test_a_full_queue_is_busy(model):
    app = build_app(model, settings=ServeSettings(waiting=4))
    with TestClient(app) as client:
        app.state.service.scorer.under_way = 3
        assert ask(client, files(neptune())).status_code == 200
        answer = ask(client, files(neptune(), neptune()))
        assert refusal(answer) == 503 and answer.headers["retry-after"] == "1"


def test_other_sites_are_answered_the_long_way_too(model):
    "With CORS there is no short way to the function."
    with TestClient(build_app(model, settings=ServeSettings(cors_origins="https://a.org"))) as client:
        assert values(ask(client, files(neptune()), "/v2/models/tiny/versions/7/infer"))["label"] == ["Neptune"]
        assert refusal(ask(client, files(b"x"))) == 415


def test_a_version_in_the_path_is_the_champion_alone(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("champion", "challenger")]
    for i, folder in enumerate(folders):
        colour_model(folder, {"Mars": 0, "Neptune": 2}, version=str(i + 1))
    app = build_app(folders[0], settings=ServeSettings(challenger="canary:1"))
    service = app.state.service
    monkeypatch.setattr(service.models.challenger, "predictor", type(service.models.current)(folders[1]))
    with TestClient(app) as client:
        assert ask(client, files(neptune())).json()["model_version"] == "2"
        assert ask(client, files(neptune()), "/v2/models/tiny/versions/1/infer").json()["model_version"] == "1"


def test_nothing_went_wrong_in_the_log(client, log):
    assert client.get("/v2/health/live").status_code == 200  # ran last: everything above is in the log by now
    assert "Traceback" not in log.read_text()


# ------------------------------------------------------------------------------------------------------ a real client

CLIENT = """
import sys
import numpy as np
import tritonclient.http as http
client = http.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("tiny") and client.is_model_ready("tiny", "7") and not client.is_model_ready("other")
assert client.get_server_metadata()["name"] == "celestial"
assert client.get_model_metadata("tiny")["versions"] == ["7"]
images = np.load(sys.argv[2])
pixels = http.InferInput("image", list(images.shape), "UINT8")
files = http.InferInput("image", [1], "BYTES")
content = np.array([open(sys.argv[3], "rb").read()], dtype=np.object_)
for binary in (True, False):
    outputs = [http.InferRequestedOutput(name, binary_data=binary) for name in ("label", "known", "probabilities", "ood_score")]
    if binary or images.size < 200_000:
        pixels.set_data_from_numpy(images, binary_data=binary)
    answer = client.infer("tiny", [pixels], request_id="42", outputs=outputs)
    assert answer.get_response()["id"] == "42"
    assert [str(one, "utf8") if binary else one for one in answer.as_numpy("label")] == ["Neptune", "Mars"]
    assert answer.as_numpy("known").tolist() == [True, True] and answer.as_numpy("known").dtype == bool
    assert answer.as_numpy("probabilities").shape == (2, 10) and answer.as_numpy("ood_score").dtype == np.float32
files.set_data_from_numpy(content)
answer = client.infer("tiny", [files], model_version="7")
assert answer.as_numpy("label").tolist() == [b"Neptune"]
best = client.infer("tiny", [files], outputs=[http.InferRequestedOutput("probabilities", class_count=3)])
assert best.as_numpy("probabilities").shape == (1, 3)
jobs = [client.async_infer("tiny", [files]) for _ in range(20)]
assert {job.get_result().as_numpy("label")[0] for job in jobs} == {b"Neptune"}
try:
    client.infer("other", [files])
    raise SystemExit("another model answered")
except http.InferenceServerException as e:
    assert "no model" in e.message(), e
print("done")
"""


@pytest.fixture(scope="session")
def triton_python(tmp_path_factory):
    "An environment with NVIDIA's client of the protocol, made once."
    folder = Path.home() / ".cache" / "celestial-tests" / "tritonclient"
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        uv = shutil.which("uv")
        make = [uv, "venv", "-q", "--clear", "-p", sys.executable] if uv else [sys.executable, "-m", "venv"]
        install = [uv, "pip", "install", "-q", "--python", python] if uv else [python, "-m", "pip", "install", "-q"]
        for command in ([*make, folder], [*install, "tritonclient[http]>=2.60"]):
            if subprocess.run(command).returncode:
                pytest.skip("tritonclient can't be installed")
        (folder / "ready").touch()
    return python


@pytest.mark.triton
def test_tritonclient_works(client, triton_python, tmp_path):
    np.save(tmp_path / "images.npy", np.stack([render("Neptune"), render("Mars")]))
    (tmp_path / "picture.jpg").write_bytes(neptune("JPEG"))
    command = [
        triton_python,
        "-c",
        CLIENT,
        client.base_url.netloc.decode(),
        tmp_path / "images.npy",
        tmp_path / "picture.jpg",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
