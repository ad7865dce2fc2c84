"What no answer may hold, and what no request may break: places of files, long names, metadata that unpacks, IPv6."

import io
import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serving import chunk, neptune, running, tiny_model, until

from celestial_ml.core.files import read_json, write_json
from celestial_ml.data.images import open_image
from celestial_ml.package.published import models_folder
from celestial_ml.serve.live_models import Models
from celestial_ml.serve.service_metrics import ServiceMetrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    model = tiny_model(folder / "model")
    about = read_json(model / "model.json")
    about["lineage"]["parameters"] = {"data": {"folder": "/home/ada/photos", "size": 64}}
    write_json(model / "model.json", about)
    settings = {"log_url": f"sqlite:///{folder}/log.db", "trusted_proxies": "127.0.0.1", "feedback_limit": "30/minute"}
    with running(model, folder / "log", rate_limit="500/minute", **settings) as url:
        yield url


@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/explain", "/gradio_api/upload"])
@pytest.mark.parametrize("boundary", ["x" * 300, "x" * 5000])
def test_a_long_boundary_is_a_client_error(url: str, path: str, boundary: str) -> None:
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    answer = httpx.post(url + path, content=f"--{boundary}--\r\n", headers=kind)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_request"


@pytest.mark.parametrize("name", ["a" * 300, "é" * 150, "a" * 5000, "/".join("a" * 2000), "/".join(["b" * 190] * 40)])
@pytest.mark.parametrize("place", ["assets", "static", "docs/static"])
def test_a_path_with_a_long_name_is_not_found(url: str, place: str, name: str) -> None:
    assert httpx.get(f"{url}/{place}/{name}").status_code in (404, 414)


def test_model_page_hides_paths_of_the_training_machine(url: str) -> None:
    assert httpx.get(f"{url}/model").json()["lineage"]["parameters"]["data"] == {"folder": "…/photos", "size": 64}


def test_ipv6_is_counted_by_network(url: str) -> None:
    "Somebody who has a /64 is one person to every limit."
    as_one = [{"X-Forwarded-For": f"2001:db8::{i:x}"} for i in range(40)]
    wrong = {"request_id": "nobody", "correct": True}
    answers = [httpx.post(f"{url}/feedback", json=wrong, headers=one).status_code for one in as_one]
    assert answers.count(404) == 30 and answers[-1] == 429
    other = httpx.post(f"{url}/feedback", json=wrong, headers={"X-Forwarded-For": "2001:db8:0:1::1"})
    assert other.status_code == 404


def test_errors_of_the_log_are_hidden_from_clients(tmp_path: Path) -> None:
    model, log = tiny_model(tmp_path / "model"), tmp_path / "secret-place.db"
    with running(model, tmp_path / "log", demo=False, log_url=f"sqlite:///{log}") as url:
        number = httpx.post(f"{url}/predict", files={"image": neptune()}).json()["request_id"]
        said = {"request_id": number, "correct": True}
        until(lambda: httpx.post(f"{url}/feedback", json=said).status_code == 200)
        log.unlink()
        log.write_bytes(b"no database" * 1000)
        answer = httpx.post(f"{url}/feedback", json=said, timeout=20)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "log_unavailable"
        assert "secret-place" not in answer.text and str(tmp_path) not in answer.text
    assert "secret-place" in (tmp_path / "log").read_text()  # where it is for those who run it


def packed_exif(words: bytes) -> bytes:
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(words, 9))


def test_compressed_metadata_is_unpacked_once_within_a_limit() -> None:
    good = neptune()
    for words in (b"\n" * 3_000_000, b"\n\n\nzz" + b"0" * 3_000_000, b"\n" * 150_000):
        content = good[:33] + packed_exif(words) * 400 + good[33:]
        assert len(content) < 2_000_000
        began = time.process_time()
        assert open_image(content).orientation == 1
        assert time.process_time() - began < 0.2


def test_exif_in_many_segments_is_joined_once() -> None:
    good, segment = neptune("JPEG"), b"Exif\0\0" + b"II*\0" + bytes(90)
    content = good[:2] + (b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment) * 19_000 + good[2:]
    began = time.process_time()
    assert open_image(content).orientation == 1
    assert time.process_time() - began < 0.3


def test_compressed_metadata_still_gives_the_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    digits = exif.tobytes().hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    good = neptune()
    words = f"\nexif\n{len(digits) // 2:8}\n{lines}\n".encode()
    assert open_image(good[:33] + packed_exif(words) + good[33:]).orientation == 6


def test_a_png_with_two_headers_leaves_only_json_in_the_log(url: str, folder: Path) -> None:
    "Pillow warns of it, though nobody decodes it."
    good = neptune()
    twice = good[:33] + chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)) + good[33:]
    assert httpx.post(f"{url}/predict", files={"image": io.BytesIO(twice)}).status_code == 400
    assert all(json.loads(line) for line in (folder / "log").read_text().splitlines())


@pytest.fixture
def champion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Models, Path]]:
    "The models of a registry that is looked at all the time, and the champion's folder."
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path))
    folder = tiny_model(models_folder() / "tiny" / "7")
    write_json(models_folder() / "champion.json", {"model": "tiny/7"})
    models = Models(ServiceMetrics())
    models.watch(0.01)
    yield models, folder
    models.close()


@pytest.mark.parametrize("name", ["\0", "\ud800", "a" * 5000, "/etc", 7, None, ["tiny/7"]])
def test_a_pointer_without_a_name_is_refused_and_the_next_one_accepted(
    champion: tuple[Models, Path], name: object
) -> None:
    models, _ = champion
    pointer = models_folder() / "champion.json"
    pointer.write_text(json.dumps({"model": name}))
    until(lambda: models.champion.reason)
    assert (models.champion.reason or "").encode()  # it can be sent
    write_json(pointer, {"model": "tiny/7"})
    until(lambda: models.champion.reason is None, 10)
    assert models.watcher and models.watcher.is_alive()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", None),
        ("classes", []),
        ("classes", "abcdefghij"),
        ("classes", [1]),
        ("ood_threshold", "x"),
        ("ood_threshold", None),
        ("version", None),
        ("version", 7),
        ("lineage", None),
        ("metrics", 3),
        ("name", None),
        ("files", None),
        ("sha256", None),
    ],
)
def test_a_manifest_with_wrong_types_is_refused(champion: tuple[Models, Path], field: str, value: object) -> None:
    models, folder = champion
    good = read_json(folder / "model.json")
    before = models.now()
    write_json(folder / "model.json", good | {field: value})
    until(lambda: models.champion.reason)
    assert models.now() is before
    write_json(folder / "model.json", good)
    until(lambda: models.champion.reason is None, 10)
