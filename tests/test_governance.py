"Who vouches for a model, where an answer comes from, and that a picture that was deleted is nowhere any more."

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from packages import package
from serving import neptune
from typer.testing import CliRunner

from celestial_ml.cli.app import app
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import read_json, sha256_of, write_json
from celestial_ml.core.params import Register
from celestial_ml.data.feature_store import FeatureStore, Measuring
from celestial_ml.data.images import decode_image
from celestial_ml.label import forget
from celestial_ml.label.labelled import propose_feedback, write_labelled
from celestial_ml.label.queue import Waiting, enqueue
from celestial_ml.label.store import review
from celestial_ml.monitor.log import open_log
from celestial_ml.monitor.retention import ImagePolicy
from celestial_ml.package.manifest import read_manifest
from celestial_ml.package.published import pointer_file, published
from celestial_ml.package.signature import SIGNATURE, sign
from celestial_ml.registry.audit import append
from celestial_ml.registry.decisions import rollback, submit
from celestial_ml.registry.state import recover
from celestial_ml.registry.versions import publish
from celestial_ml.serve.api import build_app


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A folder with key.pem, key.pub and the pair of somebody else; the state folder is beside it."
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("key", "other"):
        make = f"openssl ecparam -name prime256v1 -genkey -noout -out {name}.pem"
        for command in (make, f"openssl ec -in {name}.pem -pubout -out {name}.pub"):
            subprocess.run(command.split(), check=True, capture_output=True)
    return tmp_path


def celestial(*arguments: str) -> tuple[int, str]:
    "The exit code of a command, and all that it says."
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_a_server_serves_only_what_was_signed(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "It keeps its model when the next champion was changed in any file, isn't signed, or by somebody else."
    monkeypatch.setenv("CELESTIAL_SIGNING_KEY", "key.pem")
    publish(package(keys / "a"), "tiny/1")
    (published("tiny/1") / "model_card.html").write_text("the card")
    sign(published("tiny/1"))
    (published("tiny/1") / "data_card.html").write_text("added later")
    (published("tiny/1") / "gate.json").write_text("{}")
    for number in (2, 3):
        publish(package(keys / "b"), f"tiny/{number}")
    sign(published("tiny/3"), "other.pem")
    monkeypatch.setenv("CELESTIAL_VERIFY_KEY", "key.pub")
    write_json(pointer_file("champion"), {"model": "tiny/1"})
    with TestClient(build_app(None)) as client:
        models = client.app.state.service.models  # type: ignore[attr-defined]

        def ready() -> dict[str, str]:
            models.champion.backoff.at = 0
            models.refresh()
            return dict(client.get("/ready").json())

        assert ready() == {"status": "ready", "model_version": "tiny/1"}
        assert client.get("/model/card").text == "the card" and client.get("/model").json()["card"] == "/model/card"
        assert client.get("/model/data_card.html").status_code == 404, "it isn't signed"
        whole = keys / "whole"
        shutil.copytree(published("tiny/2"), whole)
        served = [*read_manifest(whole).checksums, "model.json", SIGNATURE]
        write_json(pointer_file("champion"), {"model": "tiny/2"})
        for name in served:
            shutil.copytree(whole, published("tiny/2"), dirs_exist_ok=True)
            content = (whole / name).read_bytes()
            (published("tiny/2") / name).write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
            answer = ready()
            assert answer["model_version"] == "tiny/1" and "not what was signed" in answer["refused"], name
            assert name in answer["refused"] or name == SIGNATURE
            assert client.post("/predict", files={"image": neptune()}).json()["model_version"] == "tiny/1"
        (published("tiny/2") / SIGNATURE).unlink()
        assert "is not signed" in ready()["refused"]
        write_json(pointer_file("champion"), {"model": "tiny/3"})
        assert "another" in ready()["refused"]
        (published("tiny/1") / "model_card.html").write_text("changed")
        assert client.get("/model/card").status_code == 404
        sign(published("tiny/3"))
        assert ready() == {"status": "ready", "model_version": "tiny/3"}
    monkeypatch.delenv("CELESTIAL_VERIFY_KEY")
    write_json(pointer_file("champion"), {"model": "tiny/2"})
    with TestClient(build_app(None)) as client:
        assert client.get("/ready").json()["model_version"] == "tiny/2", "unsigned, and nobody wants a signature"


def test_commands_load_only_what_was_signed(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = keys / "neptune.png"
    picture.write_bytes(neptune())
    for number in (1, 2):
        publish(package(keys / f"{number}", 0.95 + number / 100), f"tiny/{number}")
        append("register", f"tiny/{number}", "registered", {})
    append("promote", "tiny/1", "champion", {})
    recover()
    assert celestial("predict", str(picture))[0] == 0, "unsigned models are fine without a key"
    monkeypatch.setenv("CELESTIAL_VERIFY_KEY", "key.pub")
    for command in (("predict", str(picture)), ("batch", str(picture), "out.parquet")):
        code, words = celestial(*command)
        assert code == 2 and "is not signed" in words and "celestial models sign" in words, command
    verdict = submit("tiny/2", Register(), "Ada", by_hand=True)
    assert not verdict.promoted and any("is not signed" in rule.why for rule in verdict.rules if not rule.passed)
    assert celestial("models", "sign", "tiny/2")[0] == 2, "no key"
    for version in ("champion", "tiny/2"):
        assert celestial("models", "sign", version, "--key", "key.pem")[0] == 0
        assert (
            celestial("models", "verify", version)[0]
            == celestial("models", "verify", version, "--key", "key.pub")[0]
            == 0
        )
        assert celestial("models", "verify", version, "--key", "other.pub")[0] == 1
    assert celestial("predict", str(picture))[0] == 0
    verdict = submit("tiny/2", Register(), "Ada", by_hand=True)
    assert not [rule for rule in verdict.rules if rule.kind == "deployment" and not rule.passed]
    append("promote", "tiny/2", "champion", {})
    recover()
    about = read_json(published("tiny/1") / "model.json")
    write_json(published("tiny/1") / "model.json", about | {"ood_threshold": 1e9})
    code, words = celestial("models", "verify", "tiny/1", "--json")
    assert code == 1 and "model.json" in words
    with pytest.raises(CelestialError, match="not what was signed"):
        rollback()
    assert recover().champion == "tiny/2"


def answered(root: Path) -> tuple[str, bytes]:
    "An answer of a real service whose picture is then judged, labelled, queued, measured and written; its id, the picture."
    root.mkdir(exist_ok=True)
    (root / "pipeline.yaml").touch()
    if not published("tiny/1").exists():
        publish(package(root.parent / "a"), "tiny/1")
        append("register", "tiny/1", "registered", {}, "Ada")
        append("promote", "tiny/1", "champion", {"why": "the first"}, "Ada")
        recover()
    picture = neptune()
    with TestClient(build_app(None, log=(log := open_log(images=ImagePolicy("all"))))) as client:
        answer = client.post("/predict", files={"image": picture}).json()
        said = {"request_id": answer["request_id"], "correct": False, "label": "Uranus"}
        assert client.post("/feedback", json=said).status_code == 200
    log.close()
    sha256 = answer["sha256"]
    enqueue([Waiting(sha256, "log")], {sha256: picture})
    assert propose_feedback()["new"] == 1
    review({sha256: "Uranus"}, "Rosa")
    write_labelled(root)
    with FeatureStore() as store:
        measuring = Measuring(store, [sha256])
        measuring.row(sha256, decode_image(picture))
        measuring.save()
    return answer["request_id"], picture


def test_an_answer_is_traced_to_its_model_and_people(keys: Path) -> None:
    request_id, picture = answered(keys / "project")
    code, words = celestial("models", "lineage", request_id, "--json")
    whole = json.loads(words)
    assert code == 0 and whole["answer"]["sha256"] == sha256_of(picture) and whole["feedback"][0]["label"] == "Uranus"
    assert [one["annotator"] for one in whole["judgements"]] and whole["judgements"][0]["reviewer"] == "Rosa"
    about, made = read_manifest(published("tiny/1")), whole["model"]
    assert (made["model"], made["sha256"]) == ("tiny/1", about.sha256)
    assert made["data_sha256"] == about.lineage.data_sha256 and made["run"] == "tiny"
    assert [(one["who"], one["action"]) for one in made["decisions"]] == [("Ada", "register"), ("Ada", "promote")]
    for name in (request_id, "champion", "tiny/1"):
        code, words = celestial("models", "lineage", name)
        assert code == 0 and "promote" in words and about.sha256 in words
    for nothing in ("0" * 16, "tiny/9", "previous"):
        assert celestial("models", "lineage", nothing)[0] == 2


def remains(places: list[Path], picture: bytes) -> list[Path]:
    "The files that still hold a picture, or its checksum, in their content or name."
    parts = [sha256_of(picture).encode(), *(picture[at : at + 48] for at in range(100, len(picture) - 48, 400))]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return [
        path for path in files if any(part in path.read_bytes() for part in parts) or sha256_of(picture) in path.name
    ]


def killed_at(stage: int, picture: Path, root: Path) -> None:
    "Delete a picture in another process, which is killed after that stage."
    if pid := os.fork():
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), stage
        return
    name = ("forget", "forget_label", "list", "_forget_files", "track_labelled", "forget_features", "holders")[stage]
    before = getattr(forget, name, list)

    def last(*arguments: object, **more: object) -> None:
        before(*arguments, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(forget, name, last)  # `list`: when the file is gone and the table isn't written
    forget.forget_picture(str(picture), root)
    os._exit(1)


def test_a_deleted_picture_is_nowhere(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Also where the command was killed at any stage, and then repeated; versions that learned from it are named."
    root, places = keys / "project", [keys / "home", keys / "project"]
    for stage in range(7):
        picture = answered(root)[1]
        (keys / "copy.png").write_bytes(picture)
        held = {path.name for path in remains(places, picture)}
        assert {"predictions.db", "labels.db", "features.db", "labels.csv"} <= held
        killed_at(stage, keys / "copy.png", root)
        monkeypatch.chdir(root)
        code, words = celestial("log", "forget", str(keys / "copy.png"), "--json")
        monkeypatch.chdir(keys)
        assert code == 0 and json.loads(words)["sha256"] == sha256_of(picture)
        assert not remains(places, picture), stage
    publish(package(keys / "b", learned=(sha256_of(picture),)), "tiny/2")
    publish(package(keys / "c", sha256=[sha256_of(picture)], right=np.array([True])), "tiny/3")
    assert forget.holders(sha256_of(picture))["versions"] == {"tiny/2": "trained", "tiny/3": "tested"}
    code, words = celestial("log", "forget", sha256_of(picture))
    assert code == 0 and "celestial models retire tiny/2" in words and "tiny/1" not in words
    assert celestial("log", "forget", "nothing.png")[0] == 2


def test_without_a_key_nothing_of_signing_is_imported(keys: Path) -> None:
    publish(package(keys / "a"), "tiny/1")
    (keys / "n.png").write_bytes(neptune())
    code = (
        "import sys; from celestial_ml.package.published import find_model; from celestial_ml.serve.predictor import Predictor;"
        "Predictor(find_model('tiny/1')).predict('n.png'); assert not {'model_signing', 'cryptography'} & set(sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "CELESTIAL_VERIFY_KEY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
