"""Transfer learning: the port of the backbone is exact, its weights are read safely, and `auto` chooses by evidence."""

import os
import pickle
import socket
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest

from celestial_ml.core.errors import CelestialError
from celestial_ml.core.params import Model, Prepare, Train
from celestial_ml.core.seeds import set_seed
from celestial_ml.model import pretrained
from celestial_ml.model.choose import choose
from celestial_ml.model.evaluate import logits_and_embeddings, with_embedding
from celestial_ml.model.export import serving_graph
from celestial_ml.model.networks import build_network
from celestial_ml.model.train import fit
from celestial_ml.model.unknown import fit_ood_score


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
        length = np.linalg.norm(original["features"], axis=1, keepdims=True)  # that we leave out
        assert abs(features[:, -1280:] * length - original["features"]).max() < 1e-4
        tensors = pretrained.backbone_weights()
        logits = features[:, -1280:] * length @ tensors["_fc.weight"].T + tensors["_fc.bias"]
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


@pytest.mark.parametrize("network", ["efficientnet_lite0", pytest.param("auto", marks=pytest.mark.slow)])
def test_auto_does_not_turn_what_a_turn_would_change(at_home: Path, network: str) -> None:
    model, train, table = choose(
        marks(80, 0), marks(40, 1), 4, Model(network=network), Train(augment="auto", epochs=5), seed=7
    )
    assert train.augment in ("upright", "none")
    by_level = table[table.network == "efficientnet_lite0"].set_index("augment").score
    assert by_level["sky"] <= by_level[["upright", "none"]].max()
    assert table[table.chosen].score.item() >= table.score.max() - 0.05
    assert model.network == table[table.chosen].network.item()


Weights = dict[str, np.ndarray]


def weights_of(model) -> Weights:  # type: ignore[no-untyped-def]
    "A network's weights, by name."
    return {weight.path: np.array(weight) for weight in model.weights}


def same(one: Weights, other: Weights) -> bool:
    return all((one[name] == other[name]).all() for name in one)


def fine_tune(lr: float, stop: int = 99, checkpoint: Path | None = None):  # type: ignore[no-untyped-def]
    "Three epochs of the head, two of the whole network: that, its weights after the head, and the history."
    set_seed(7, tensorflow=True)
    model, frozen = build_network(Model(network="efficientnet_lite0"), (64, 64, 3), 4), {}
    p = Train(augment="upright", views=1, epochs=3, finetune_epochs=2, finetune_lr=lr)

    def listen(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == 3:
            frozen.update(weights_of(model))
        if epoch == stop:
            raise KeyboardInterrupt

    history = fit(model, marks(48, 0), marks(24, 1), p, 7, listen, checkpoint)
    return model, frozen, history


def assert_served_as_trained(model) -> None:  # type: ignore[no-untyped-def]
    "The file that is served answers as the network does, its score too."
    pixels, labels = marks(16, 2)
    logits, embeddings = logits_and_embeddings(with_embedding(model), pixels)
    ood, _ = fit_ood_score(embeddings, labels, embeddings)
    session = onnxruntime.InferenceSession(serving_graph(model, Prepare(size=64), ood).SerializeToString())
    names = [output.name for output in session.get_outputs()]
    for i in range(4):
        answer = dict(zip(names, session.run(None, {"image": pixels[i : i + 1]}), strict=True))
        assert abs(answer["logits"][0] - logits[i]).max() < 1e-3 * max(1, abs(logits).max())
        assert np.allclose(answer["ood_score"], ood(embeddings[i : i + 1]), rtol=1e-2, atol=1e-2)


def test_fine_tuning_is_kept_where_the_validation_loss_falls(at_home: Path, tmp_path: Path) -> None:
    import keras

    model, frozen, history = fine_tune(1e-4)
    tuned = weights_of(model)
    assert history.epoch.tolist() == [1, 2, 3, 4, 5] and history.val_loss[3:].min() < history.val_loss[2]
    stays = {name for name in tuned if (tuned[name] == frozen[name]).all()}
    assert {"embedding/kernel", "bn0/gamma", "bn0/moving_mean", "blocks-8-_bn2/moving_variance"} < stays
    assert not {"conv_stem/kernel", "conv_head/kernel", "logits/kernel"} & stays
    assert not pretrained.is_frozen(model)
    assert_served_as_trained(model)
    model.save(tmp_path / "model.keras")
    assert not pretrained.is_frozen(keras.saving.load_model(tmp_path / "model.keras"))


@pytest.mark.slow
def test_fine_tuning_goes_on_where_it_was(at_home: Path, tmp_path: Path) -> None:
    model, _, history = fine_tune(1e-4)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(1e-4, 4, tmp_path / "checkpoint.npz")
    again, _, resumed = fine_tune(1e-4, checkpoint=tmp_path / "checkpoint.npz")
    pd.testing.assert_frame_equal(resumed, history)
    assert same(weights_of(again), weights_of(model))


def test_fine_tuning_that_helps_nothing_leaves_the_frozen_network(at_home: Path) -> None:
    model, frozen, history = fine_tune(1.0)
    assert len(history) == 5 and not history.val_loss[3:].min() < history.val_loss[2]
    assert pretrained.is_frozen(model) and same(weights_of(model), frozen)


@pytest.fixture
def keras_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "Where Keras keeps what it downloads; it reads KERAS_HOME when it is imported."
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))
    (tmp_path / "models").mkdir()
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # Keras's, of the size of the pictures and of its old file format
def test_a_network_of_keras_is_one_of_ours(keras_home: Path, at_home: Path) -> None:
    import keras

    # Of its file of weights Keras knows no checksum, so that another one can stand in for the download
    original = keras.applications.MobileNet(include_top=False, weights=None, input_shape=(64, 64, 3))
    rng = np.random.default_rng(0)
    original.set_weights([w + 0.1 * rng.random(w.shape).astype(w.dtype) for w in original.get_weights()])
    original.save(keras_home / "models" / "mobilenet_1_0_224_tf_no_top.h5")
    model = build_network(Model(network="keras.applications.MobileNet"), (64, 64, 3), 4)
    pixels = marks(4, 0)[0]
    features = keras.Model(model.input, model.get_layer("features").output)(pixels)
    prepared = keras.applications.mobilenet.preprocess_input(pixels.astype(np.float32))
    means = original(prepared).numpy().mean(axis=(1, 2))
    assert np.allclose(features, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-4)
    assert pretrained.is_frozen(model)
    assert_served_as_trained(model)
    assert build_network(Model(network="keras.applications.MobileNet"), (64, 64, 1), 4).output_shape == (None, 4)


def test_a_download_that_fails_is_an_error_within_bounds(keras_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "keras.applications.MobileNetV3Small"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(pretrained, "_SILENCE", 1)
        for proxy in (f"http://127.0.0.1:{port}", "http://127.0.0.1:9"):  # says nothing; isn't there
            monkeypatch.setenv("https_proxy", proxy)
            began = time.monotonic()
            with pytest.raises(CelestialError) as failure:
                build_network(Model(network=name), (64, 64, 3), 2)
            assert name in failure.value.message and "KERAS_HOME" in failure.value.hint
            assert time.monotonic() - began < 120 and socket.getdefaulttimeout() is None
    assert not list((keras_home / "models").iterdir())
