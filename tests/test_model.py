"What a run says of its model: every figure is there, and an interruption changes none of them."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from celestial_ml.core.files import read_json, sha256_of
from celestial_ml.core.params import load_params
from celestial_ml.flow.pipeline import Plan
from celestial_ml.model.robustness import read_stress
from celestial_ml.package.metrics import Metrics, read_metrics
from celestial_ml.planets.renderer import render, render_many
from celestial_ml.registry.evidence import Evidence
from celestial_ml.reports.advice import not_worth_it
from celestial_ml.serve.predictor import Predictor

TINY = ["model.width=4", "prepare.size=16", "evaluate.ood_images=4", "stress.corrupted=4", "evaluate.bootstrap=100"]


@pytest.fixture(scope="module")
def metrics(smoke: Plan) -> dict:
    return json.loads(
        Path("output/smoke/metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder of three classes, one of which is rare."
    folder = tmp_path_factory.mktemp("three")
    for body, i, _, pixels in render_many(14, 32, seed=3, bodies=["Earth", "Mars", "Uranus"]):
        if body == "Mars" and i >= 8:
            continue
        (folder / body).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / body / f"{i}.png")
    return folder


def settings(*values: str) -> list[str]:
    return [part for value in (*TINY, *values) for part in ("--set", value)]


def test_every_headline_figure_has_an_interval(metrics: dict) -> None:
    for name in ("accuracy", "macro_f1", "loss", "ece", "brier"):
        interval = metrics["intervals"][name]
        assert interval["low"] <= interval["value"] <= interval["high"], name
    assert metrics["intervals"]["accuracy"]["value"] == metrics["accuracy"]


def test_calibration_is_the_served_one(metrics: dict, smoke: Plan) -> None:
    about, table = read_json("output/smoke/model.json"), pd.read_parquet("output/smoke/predictions.parquet")
    assert about["temperature"] == metrics["calibration"]["temperature"] > 0
    answer = Predictor("output/smoke").predict(smoke.root / table.path[0])
    assert np.allclose(list(answer.probabilities.values()), table.probabilities[0], atol=1e-4)
    assert answer.ood_score == pytest.approx(table.ood_score[0], rel=1e-2)
    assert {"ece", "brier", "nll"} <= metrics["calibration"]["before"].keys() & metrics["calibration"]["after"].keys()


def test_unknown_images_are_compared_by_kind_and_by_score(metrics: dict) -> None:
    unknown = metrics["unknown"]
    assert {"bodies", "textures", "noise", "blank", "photographs"} <= unknown["kinds"].keys()
    assert {"mahalanobis", "relative_mahalanobis", "knn", "energy", "max_softmax", "combined"} == unknown[
        "compared"
    ].keys()
    assert all(0 <= kind["unknown"] <= 1 and 0 <= kind["auroc"] <= 1 for kind in unknown["kinds"].values())
    assert len(unknown["bodies"]) >= 5 and not set(unknown["bodies"]) & set(metrics["per_class"])


def rule_of(registered: dict, name: str) -> dict:
    return next(rule for rule in registered["rules"] if rule["name"] == name)


def test_without_stress_the_card_and_the_gate_say_so(metrics: dict) -> None:
    assert not {"robustness", "behaviour", "folds", "left_out"} & metrics.keys()
    assert metrics["baseline"].keys() == {"trivial", "colours", "pixels"}
    rule = rule_of(read_json("output/smoke/register.json"), "beats guide-baseline")
    assert rule["value"] is None and rule["passed"] and "--with stress" in rule["why"]
    assert "--with stress" in Path("output/smoke/model_card.md").read_text()


def test_stress_runs_beside_the_chain_and_its_results_go_with_the_model(celestial_here, smoke: Plan) -> None:
    result = celestial_here("run", "smoke", "--with", "stress", "--json")
    assert result.returncode == 0, result.stderr
    run = json.loads(result.stdout)
    assert run["ran"] == ["stress", "package", "register"]
    metrics = run["metrics"]
    table = metrics["robustness"]["per_corruption"]
    assert len(table) >= 12 and all(len(row) == 5 for row in table.values())
    assert metrics["robustness"]["mean_accuracy"] == pytest.approx(np.mean(list(table.values())))
    assert metrics["robustness"]["mce"] > 0 and metrics["baseline"].keys() == {"trivial", "colours", "pixels", "guide"}
    assert {"invariance", "directional", "minimum_functionality"} == metrics["behaviour"].keys()
    assert rule_of(run["registered"], "beats guide-baseline")["value"] is not None
    assert "--with stress" not in Path("output/smoke/model_card.md").read_text()
    again = json.loads(celestial_here("run", "smoke", "--json").stdout)
    assert again["ran"] == [] and again["metrics"] == metrics, "without it the results stay"
    predictions, results = (Path("output/smoke", name) for name in ("predictions.parquet", "stress.json"))
    assert read_stress(results, predictions)["metrics"]["robustness"] == metrics["robustness"]
    other = pd.read_parquet(predictions).assign(confidence=0.5)
    other.to_parquet("other.parquet")
    assert read_stress(results, Path("other.parquet")) == {}, "they say nothing about another training"
    unknown = celestial_here("run", "smoke", "--with", "stres")
    assert unknown.returncode == 2 and "stress" in unknown.stderr


def test_what_git_keeps_is_copied_by_a_command(celestial, smoke: Plan) -> None:
    result = celestial("keep", "smoke")
    assert result.returncode == 0, result.stderr
    assert read_json("results/smoke/metrics.json") == read_json("output/smoke/model.json")["metrics"]
    assert 6 < len(read_json("results/smoke/headline.json")) < 12
    for name in ("history.csv", "test_predictions.npz", "plots/confusion_matrix.png", "plots/history.png"):
        assert Path("results/smoke", name).read_bytes() == Path("output/smoke", name).read_bytes()


def test_simple_classifiers_stand_beside_the_model_on_the_same_images(metrics: dict) -> None:
    answers = Evidence.load("output/smoke").baselines
    table = pd.read_parquet("output/smoke/predictions.parquet")
    assert metrics["baseline"]["trivial"] == pytest.approx(0.1) and metrics["baseline"]["colours"] > 0.5
    for name, accuracy in metrics["baseline"].items():
        assert (answers[name] == table.label).mean() == pytest.approx(accuracy)
        margin = metrics["margins"][name]
        assert margin["value"] == pytest.approx(metrics["accuracy"] - accuracy)
        assert margin["low"] <= margin["value"] <= margin["high"]


def test_a_run_that_a_simple_classifier_beats_says_so_first(celestial, metrics: dict, smoke: Plan) -> None:
    warning = not_worth_it(Metrics.of(metrics, "metrics.json"))
    assert warning and metrics["accuracy"] < metrics["baseline"]["colours"]
    told = celestial("run", "smoke").stdout
    assert told.index(warning) < told.index("accuracy 0") and "next:" not in told and "--set train.epochs=40" in told
    assert warning in Path("output/smoke/report.md").read_text().partition("Is it good?")[2].partition("\n")[0]
    assert warning in Path("output/smoke/model_card.md").read_text()


def test_slices_know_how_the_images_were_rendered(metrics: dict) -> None:
    names = {row["slice"] for row in metrics["slices"]}
    assert {"phase", "size", "brightness", "sharpness", "latitude", "source", "class"} <= names
    assert metrics["fairness"].keys() >= {"worst", "gap"}


def test_small_builds_are_written_beside_the_served_one(smoke: Plan) -> None:
    about = read_json("output/smoke/model.json")
    sizes = {name: Path("output/smoke", name).stat().st_size for name in ("model.onnx", "model.int8.onnx")}
    assert sizes["model.int8.onnx"] < sizes["model.onnx"]
    assert about["file"] == "model.onnx" and about["compression"]["edge"]["parity"] < 1e-3
    assert {"float32", "int8"} < about["compression"]["files"].keys()
    assert about["files"]["reference.npz"] == sha256_of("output/smoke/reference.npz")


@pytest.mark.slow
def test_int8_is_served_where_it_is_as_good(celestial, smoke: Plan) -> None:
    result = celestial(
        "run", "smoke", *settings("package.serve=int8", "package.int8_loss=0.5", "register.publish=true")
    )
    assert result.returncode == 0, result.stderr
    about = read_json("output/smoke/model.json")
    passes = about["compression"]["passes"]
    assert about["file"] == ("model.int8.onnx" if passes else "model.onnx")
    assert passes or about["compression"]["reasons"], "a refusal says why"
    assert about["sha256"] == sha256_of(Path("output/smoke", about["file"]))
    published = Path(".celestial/models", read_json("output/smoke/register.json")["model"])
    reports = {"gate.json", "model_card.md", "model_card.html", "data_card.md", "data_card.html"}
    assert {about["file"], "model.json", *about["files"]} | reports == {path.name for path in published.iterdir()}
    beside = {
        "reference.npz",
        "selftest.npz",
        "test_predictions.npz",
        "performance.json",
        "performance.webp",
        "held_out.npz",
        "monitor.npz",
    }
    assert beside == about["files"].keys()


@pytest.mark.slow
def test_folds_left_out_classes_and_rare_ones(celestial, at_home: Path, three: Path) -> None:
    asked = ["stress.folds=2", "stress.leave_one_out=true", "train.class_weights=balanced", "train.patience=1"]
    result = celestial(
        *("run", "smoke", "--run", "three", "--with", "stress"),
        *settings("data.source=folder", f"data.folder={three}", *asked),
    )
    assert result.returncode == 0, result.stderr
    metrics = read_json("output/three/model.json")["metrics"]
    assert len(metrics["folds"]["folds"]) == 2 and 0 <= metrics["folds"]["mean"] <= 1
    assert [row["class"] for row in metrics["left_out"]["classes"]] == ["Earth", "Mars", "Uranus"]
    assert metrics["left_out"]["worst"]["auroc"] == min(row["auroc"] for row in metrics["left_out"]["classes"])


@pytest.mark.slow
def test_images_of_the_test_source_are_only_tested_on(celestial, at_home: Path, tmp_path: Path) -> None:
    for body, i, _, pixels in render_many(2, 32, seed=5):
        (tmp_path / body).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / body / f"{i}.png")
    for name, body in {"Mars": "Mars", "Moon": "Moon", "Sun": "Venus"}.items():
        (at_home / "photos" / name).mkdir(parents=True)
        Image.fromarray(render(body, size=64)).save(at_home / "photos" / name / "1.png")
    chosen = ["data.per_class=6", f"data.folder={tmp_path}", "data.test_source=folder", "data.val=0.3"]
    chosen += ["evaluate.photos=photos"]
    result = celestial("run", "smoke", "--run", "other", *settings(*chosen))
    assert result.returncode == 0, result.stderr
    features = pd.read_parquet("output/other/features.parquet")
    assert set(features[features.source == "folder"].split) == {"test"}
    assert not features[features.source == "render"].split.eq("test").any()
    assert read_json("output/other/metrics.json")["images"] == features.source.eq("folder").sum() == 20
    photos = read_metrics(Path("output/other")).photos
    assert photos.right.images == 2 and photos.others_unknown.images == 1
    assert photos.known_right.count + photos.known_wrong.count + photos.unknown.count == 2
    assert (
        "2 photographs" in Path("output/other/report.md").read_text() and Path("output/other/plots/photos.png").exists()
    )
    assert load_params("sim2real", folder=Path("params")).data.test_source == "guide"


UP_TO_TRAIN = """
import sys
from pathlib import Path
from celestial_ml.flow.pipeline import make_plan, execute
execute(make_plan(Path.cwd(), "smoke", ["train.epochs=5"], sys.argv[1], until="train"), quiet=True)
"""


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(at_home: Path) -> None:
    "kill -9 after the first epochs; the rerun ends at the very weights of a run that wasn't disturbed."
    env, quiet = os.environ | {"PYTHONPATH": str(at_home)}, {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole, killed = ([sys.executable, "-c", UP_TO_TRAIN, run] for run in ("whole", "killed"))
    process = subprocess.Popen(killed, env=env, **quiet)
    checkpoint, deadline = Path("output/killed/.checkpoint.npz"), time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists(), "it was killed while it trained"
    others = [subprocess.Popen(command, env=env, **quiet) for command in (killed, whole)]
    assert [other.wait(600) for other in others] == [0, 0]
    weights = [keras.saving.load_model(f"output/{run}/model.keras").get_weights() for run in ("whole", "killed")]
    assert all((a == b).all() for a, b in zip(*weights, strict=True))
    histories = [pd.read_csv(f"output/{run}/history.csv") for run in ("whole", "killed")]
    pd.testing.assert_frame_equal(*histories)
    assert not checkpoint.exists(), "a finished training leaves none"
