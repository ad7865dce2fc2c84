"The served files of a run: from a cold shell, against Keras, and as int8."

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from bench import CELESTIAL, Row, in_turn, wall
from celestial_ml.core.files import project_root, read_json
from celestial_ml.data.images import decode_image
from celestial_ml.serve.predictor import Predictor


def median_ms(work: Callable[[], object], times: int) -> float:
    "The median of some calls, in milliseconds, after a warm-up."
    for _ in range(3):
        work()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return 1000 * statistics.median(took)


# What no command can leave out: Python, its imports, the session, the picture, the network.
_BARE = """
import sys
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1])
session.run(None, {session.get_inputs()[0].name: np.asarray(Image.open(sys.argv[2]).convert("RGB"))[None]})
"""

_KERAS = """
import sys
import keras, numpy as np
from PIL import Image
model = keras.saving.load_model(sys.argv[1])
side = model.input_shape[1]
print(model.predict(np.asarray(Image.open(sys.argv[2]).convert("RGB").resize((side, side)))[None], verbose=0).argmax())
"""


def cold_predict(run: Path, picture: Path, times: int) -> Row:
    "One picture from a cold shell."
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    took = in_turn(
        times,
        ours=lambda: wall([CELESTIAL, "predict", picture, "--model", run]),
        keras=lambda: wall([sys.executable, "-c", _KERAS, run / "model.keras", picture], **quiet),
        bare=lambda: wall([sys.executable, "-c", _BARE, run / "model.onnx", picture]),
    )
    return Row(
        "celestial predict one.jpg, from a cold shell",
        "s",
        took["ours"],
        {"Python, Keras load and predict": took["keras"]},
        {"Python, one ONNX Runtime session": took["bare"]},
        goal=1.0,
        limit_goal=1 / 1.3,
        why="The limit imports neither Typer, which reads the command line, nor pydantic, which reads the model's manifest.",
    )


def model_rows(run: Path, times: int) -> list[Row]:
    "A cold shell; one answer; the int8 file."
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import numpy as np

    measured = pd.read_parquet(run / "predictions.parquet")
    path = project_root() / measured.path[0]
    content, pixels = path.read_bytes(), np.load(run / "pixels.npy")[:1]
    picture = decode_image(content)
    predictor, model = Predictor(run, threads=1), keras.saving.load_model(run / "model.keras")
    one = in_turn(
        times,
        onnx=lambda: median_ms(lambda: predictor.run(picture), 100),
        whole=lambda: median_ms(lambda: predictor.predict(content), 100),
        keras=lambda: median_ms(lambda: model.predict(pixels, verbose=0), 10),
    )
    peer = {"keras.Model.predict": one["keras"]}
    return [
        cold_predict(run, path, times),
        Row("one picture on one thread, by the served file", "ms", one["onnx"], peer, goal=10.0),
        Row(
            "the same, with decoding and all of an answer", "ms", one["whole"], peer, {"the network alone": one["onnx"]}
        ),
        *int8_rows(run, measured, times),
    ]


def int8_rows(run: Path, measured: pd.DataFrame, times: int) -> list[Row]:
    "The int8 file, calibrated on training images, against the float32 one, on the measured images."
    import onnx

    from celestial_ml.model.compress import compare_files, quantize

    about, features = read_json(run / "model.json"), pd.read_parquet(run / "features.parquet")
    learned = features[features.split == "train"]
    learned = learned.sample(min(100, len(learned)), random_state=0)
    root = project_root()
    small = quantize(onnx.load(run / "model.onnx"), [decode_image(root / path) for path in learned.path])
    pictures, labels = [decode_image(root / path) for path in measured.path], measured.label.tolist()
    files = {"float32": run / "model.onnx", "int8": small.SerializeToString()}
    tables = [compare_files(files, pictures, labels, about["classes"], about["ood_threshold"]) for _ in range(times)]
    figures = {
        (one, what): [float(t.loc[one, what]) for t in tables] for one in files for what in ("kB", "ms", "accuracy")
    }
    return [
        Row(
            f"the int8 file: {what}",
            unit,
            figures["int8", column],
            {"the float32 file": figures["float32", column]},
            goal=goal,
        )
        for what, column, unit, goal in (
            ("size", "kB", "kB", 2.0),
            ("one picture", "ms", "ms", None),
            (f"accuracy on {len(measured)} images", "accuracy", "share", 0.995),
        )
    ]
