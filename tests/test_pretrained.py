"""Transfer learning: the port of the backbone is exact, its weights are read safely, and `auto` chooses by evidence."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from celestial_ml.core.params import Model, Train
from celestial_ml.model import pretrained
from celestial_ml.model.choose import choose
from celestial_ml.model.networks import build_network


def pictures() -> np.ndarray:
    "The three pictures that the original network has answered."
    y, x = np.mgrid[:224, :224] / 224
    waves = np.stack([255 * x, 255 * y, 127 * (1 + np.sin(40 * x * y))], -1)
    disc = np.stack([255 * ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1), 200 * x * (y > 0.3), 90 + 0 * x], -1)
    return np.stack([waves, disc, np.random.default_rng(0).integers(0, 256, (224, 224, 3))]).astype(np.uint8)


def test_features_are_those_of_the_original() -> None:
    # reference/efficientnet_lite0.npz: `EfficientNet.from_pretrained("efficientnet-lite0")` of the package
    # efficientnet-lite-pytorch 0.1.0 under PyTorch, `extract_features((pictures - 127) / 128).mean((2, 3))`
    import keras

    model = build_network(Model(network="efficientnet_lite0"), (224, 224, 3), 2)
    features = keras.Model(model.input, model.get_layer("features").output)(pictures()).numpy()
    with np.load(Path(__file__).parent / "reference" / "efficientnet_lite0.npz") as original:
        assert abs(features[:, -1280:] - original["features"]).max() < 1e-4
        tensors = pretrained._weights()
        logits = features[:, -1280:] @ tensors["_fc.weight"].T + tensors["_fc.bias"]
        assert (logits.argmax(axis=1) == original["top"]).all()


class Harmful:
    "What a hostile file of weights would hold."

    def __reduce__(self) -> tuple:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_weights_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        pretrained.read_state_dict(pickle.dumps({"weight": Harmful()}, protocol))
    assert not list(tmp_path.iterdir())


def marks(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    "Arrows that point in four directions: a mirror or a roll makes one class of another."
    rng, labels = np.random.default_rng(seed), np.arange(n) % 4
    images = np.full((n, 64, 64, 3), 245, np.uint8)
    for image, label in zip(images, labels, strict=True):
        x, y = rng.integers(22, 42, 2)
        image[y - 3 : y + 3, x - 18 : x + 18] = 30
        for i in range(12):
            image[y - i : y + i + 1, x + 18 - i] = 30
        image[:] = np.rot90(image, label)
    return images, labels


def test_auto_does_not_turn_what_a_turn_would_change(at_home: Path) -> None:
    model, train, table = choose(
        marks(80, 0), marks(40, 1), 4, Model(network="auto"), Train(augment="auto", epochs=5), seed=7
    )
    assert train.augment in ("upright", "none")
    by_level = table[table.network == "efficientnet_lite0"].set_index("augment").score
    assert by_level["sky"] < by_level[["upright", "none"]].max() - 0.05
    assert table[table.chosen].score.item() >= table.score.max() - 0.05
    assert model.network == table[table.chosen].network.item()
