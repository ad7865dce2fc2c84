"""Training on a run's images until 0.99 of the validation images are right: ours, and Keras' own `fit`.

Both train the same network with the same optimiser, schedule and augmentation, each in a process of its own, and count from the
first batch on, compilation included. The peer is what "tf.data: Build TensorFlow input pipelines" describes: shuffle, batch,
map, prefetch. The limit is arithmetic alone: the multiplications of the network, forwards and twice as many backwards, at the
speed of a large product of matrices that was measured in the same process.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

from bench import Row, in_turn
from celestial_ml.core.params import Model, Train

ENOUGH = 0.99
WHY = (
    "Both run the same kernels of TensorFlow on the same batches. A step takes 28 ms of a core and the augmentation beside it 14 ms; "
    "forwards and backwards, depthwise convolutions and batch normalisation reach a tenth of the speed of a product of matrices."
)


class Enough(Exception):
    "The accuracy that was asked for is reached."


def prepared(run: Path) -> tuple:
    "Pixels and labels of the training and of the validation images, and the settings of the run."
    import numpy as np
    import pandas as pd

    from celestial_ml.core.files import read_json

    features, settings = pd.read_parquet(run / "features.parquet"), read_json(run / "train.json")
    pixels, labels = np.load(run / "pixels.npy"), features.label.map(settings["classes"].index).to_numpy()
    train, val = ((pixels[rows], labels[rows]) for rows in (features.split == "train", features.split == "val"))
    return train, val, Model(**settings["model"]), Train(**settings["train"]), len(settings["classes"])


def ours(run: Path, seed: int) -> dict[str, float]:
    "Seconds and epochs of `celestial_ml.model.train.fit`."
    from celestial_ml.core.seeds import set_seed
    from celestial_ml.model.networks import build_network
    from celestial_ml.model.train import fit

    train, val, model_params, params, classes = prepared(run)
    set_seed(seed, tensorflow=True)
    model = build_network(model_params, train[0].shape[1:], classes)
    began, last = time.perf_counter(), 0

    def watch(epoch: int, metrics: dict[str, float]) -> None:
        nonlocal last
        last = epoch
        if metrics["val_accuracy"] >= ENOUGH:
            raise Enough

    with contextlib.suppress(Enough):
        fit(model, train, val, params, seed, on_epoch=watch)
    return {"seconds": time.perf_counter() - began, "epochs": last, "limit": least_seconds(model, len(train[0]) * last)}


def plain(run: Path, seed: int) -> dict[str, float]:
    "Seconds and epochs of `keras.Model.fit` over a `tf.data` pipeline."
    import keras
    import tensorflow as tf

    from celestial_ml.core.seeds import set_seed
    from celestial_ml.model.augment import augment
    from celestial_ml.model.networks import build_network
    from celestial_ml.model.train import compile_model, rough_share

    train, val, model_params, params, classes = prepared(run)
    set_seed(seed, tensorflow=True)
    model = build_network(model_params, train[0].shape[1:], classes)

    def change(pixels: tf.Tensor, target: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        at = tf.random.uniform([2], maxval=2**30, dtype=tf.int32)
        return augment(pixels, at, rough_share(0, params.epochs, params.augment), params.augment), target

    targets = [keras.utils.to_categorical(labels, classes) for labels in (train[1], val[1])]
    images = tf.data.Dataset.from_tensor_slices((train[0], targets[0])).shuffle(len(train[0]), seed).batch(16)
    images = images.map(change, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    compile_model(model, params, len(images))

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
            self.model.stop_training = (logs or {})["val_accuracy"] >= ENOUGH

    began = time.perf_counter()
    watched = tf.data.Dataset.from_tensor_slices((val[0], targets[1])).batch(256)
    history = model.fit(images, epochs=params.epochs, validation_data=watched, callbacks=[Watch()], verbose=0)
    return {"seconds": time.perf_counter() - began, "epochs": len(history.epoch)}


def least_seconds(model: object, images: int) -> float:
    "What the arithmetic of training on so many images takes, on the cores that TensorFlow has."
    import tensorflow as tf

    side = 1024
    a, product = tf.random.normal((side, side)), tf.function(tf.matmul)
    product(a, a)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        product(a, a).numpy()
        times.append(time.perf_counter() - began)
    return 3 * images * multiplications(model) / (side**3 / min(times))


def multiplications(model: object) -> float:
    "Of one picture, forwards, in convolutions and dense layers."
    total = 0.0
    for layer in model.layers:  # type: ignore[attr-defined]
        if hasattr(layer, "layers"):
            total += multiplications(layer)
        elif weights := [w for w in layer.weights if len(w.shape) in (2, 4) and "kernel" in w.path]:
            places = layer.output.shape[1] * layer.output.shape[2] if len(layer.output.shape) == 4 else 1
            total += places * sum(float(w.numpy().size) for w in weights)
    return total


def training_rows(run: Path, times: int) -> list[Row]:
    "Seconds until enough validation images are right."
    limits, seeds = [], iter(range(2, 2 + 2 * times))  # both ways of a turn have one seed

    def measured(way: str) -> float:
        command = [sys.executable, "-m", "bench.training", way, str(run), str(next(seeds) // 2)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        print(f"  {way}: {figures['seconds']:.0f} s, {figures['epochs']} epochs", flush=True)
        if "limit" in figures:
            limits.append(figures["limit"])
        return figures["seconds"]

    took = in_turn(times, ours=lambda: measured("ours"), plain=lambda: measured("plain"))
    what = f"training until {ENOUGH} of the validation images are right ({run.name})"
    return [
        Row(
            what,
            "s",
            took["ours"],
            {"keras.Model.fit over tf.data": took["plain"]},
            {"arithmetic at the speed of a product of matrices": limits},
            goal=2.0,
            why=WHY,
        )
    ]


if __name__ == "__main__":
    print(json.dumps({"ours": ours, "plain": plain}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
