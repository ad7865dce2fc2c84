"Explanations that are worth showing: they go when the network's knowledge goes, and they find what the network uses."

import re
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from celestial_ml.core.files import read_json
from celestial_ml.flow.pipeline import Plan
from celestial_ml.model.explain import SANITY_LIMIT, grad_cam, map_similarity, randomised, sanity_check

RUN = Path("output/smoke")


@pytest.fixture(scope="module")
def trained(smoke: Plan) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    "The smoke run's network, its test images and what it says of them."
    features = pd.read_parquet(RUN / "features.parquet")
    pixels = np.load(RUN / "pixels.npy")[features.split == "test"]
    model = keras.saving.load_model(RUN / "model.keras")
    return model, pixels, np.asarray(model(pixels)).argmax(axis=1)


def test_randomising_the_weights_destroys_the_map(trained: tuple) -> None:
    "Adebayo et al. 2018: a map that survives this explains the picture, not the network."
    model, pixels, said = trained
    maps = grad_cam(model, pixels, said)
    assert (maps.max(axis=(1, 2)) > 0).mean() >= 0.4, "there are maps to destroy"
    left = sanity_check(model, pixels, said, seeds=5).groupby("layers")["rank"].mean()
    assert left.index[0] == 0 and left.iloc[0] > 0.75, "noise on the pictures leaves the maps alone"
    assert left.iloc[-1] < SANITY_LIMIT and left.iloc[-1] < left.iloc[0] / 2, left.to_dict()


def test_the_check_catches_a_map_that_explains_nothing(trained: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    "An edge detector looks like an explanation, and doesn't care which network it is told about."
    model, pixels, said = trained

    def edges(network: keras.Model, pictures: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.hypot(*np.gradient(pictures.mean(axis=-1), axis=(1, 2))).astype(np.float32)

    monkeypatch.setattr("celestial_ml.model.explain.grad_cam", edges)
    left = sanity_check(model, pixels, said, seeds=1).groupby("layers")["rank"].mean()
    assert left.iloc[-1] == pytest.approx(1) and left.iloc[-1] > SANITY_LIMIT


def test_randomised_leaves_the_network_alone(trained: tuple) -> None:
    model, pixels, _ = trained
    before = np.asarray(model(pixels))
    broken = np.asarray(randomised(model, seed=3)(pixels))
    assert (np.asarray(model(pixels)) == before).all() and abs(broken - before).max() > 0.01
    assert (np.asarray(randomised(model, seed=3)(pixels)) == broken).all(), "the same seed breaks it in the same way"


def test_grad_cam_tells_classes_apart(trained: tuple) -> None:
    model, pixels, said = trained
    other = grad_cam(model, pixels, (said + 1) % 10)
    alike = [map_similarity(a, b)[0] for a, b in zip(grad_cam(model, pixels, said), other, strict=True)]
    assert np.mean(alike) < 0.9


def test_the_step_shows_both_maps_and_the_check(smoke: Plan) -> None:
    rows = read_json(RUN / "explain.json")
    assert len(rows) == 10
    for row in rows:
        assert 0 <= row["share_on_body"] <= 1 and 0 <= row["cam_share_on_body"] <= 1 and len(row["looks_like"]) == 3
    html = (RUN / "explain.html").read_text()
    assert re.search(r"rank correlation is -?0\.\d\d; below 0\.5 is allowed", html)
