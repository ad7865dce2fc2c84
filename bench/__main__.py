"""The figures, as ratios measured side by side in one run: `make bench`.

Machines differ and are noisy, so every row compares two ways of doing the same thing here and now.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import CELESTIAL, Row, wall
from celestial_ml.core.files import project_root
from celestial_ml.core.params import load_params
from celestial_ml.flow.steps import load_tasks, step_parameters


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


def as_script(root: Path, params: str, run: str) -> str:
    "The code of all step notebooks as one plain script, with the parameters of a run."
    loaded, parts = load_params(params, folder=root / "params"), []
    for name, task in load_tasks(root, run).items():
        told = step_parameters(name, loaded) | {"run": run, "product": None, "upstream": None}
        for cell in json.loads((root / task.source).read_text())["cells"]:
            if cell["cell_type"] != "code":
                continue
            is_parameters = "parameters" in cell["metadata"].get("tags", [])
            parts.append(
                "\n".join(f"{k} = {v!r}" for k, v in told.items()) if is_parameters else "".join(cell["source"])
            )
    return "\n\n".join(parts)


def notebook_overhead(root: Path, params: str) -> list[Row]:
    "The pipeline of notebooks against the same library calls in one script; kernels and imports included."
    celestial = [CELESTIAL, "run", params, "--force"]
    with tempfile.TemporaryDirectory() as home:
        script = Path(home) / "script.py"
        script.write_text(as_script(root, params, "bench-script"))
        quiet = {"CELESTIAL_HOME": home, "TF_CPP_MIN_LOG_LEVEL": "3", "MPLBACKEND": "agg"}
        plain = wall([sys.executable, str(script)], **quiet)
        inline = wall([*celestial, "--run", "bench-inline"], **quiet)
        kernel = wall([*celestial, "--run", "bench-kernel", "--executor", "kernel"], **quiet)
        again = wall([*celestial[:-1], "--run", "bench-inline"], **quiet)
    return [
        (
            f"pipeline ({params}), in one process",
            f"{inline:.1f} s",
            f"one script {plain:.1f} s",
            f"{inline / plain:.2f} ×",
        ),
        (
            f"pipeline ({params}), a kernel a step",
            f"{kernel:.1f} s",
            f"one script {plain:.1f} s",
            f"{kernel / plain:.2f} ×",
        ),
        ("pipeline, nothing changed", f"{again:.2f} s", f"first run {inline:.1f} s", f"{again / inline:.3f} ×"),
    ]


def cold_predict(run: str) -> Row:
    "`celestial predict one.jpg` from a cold shell, against Python's own start."
    image = next(Path(f"output/{run}").rglob("*.jpg"))
    predict = [CELESTIAL, "predict", str(image), "--model", run]
    took = statistics.median(wall(predict) for _ in range(5))
    bare = statistics.median(wall([sys.executable, "-c", "import numpy, onnxruntime, PIL"]) for _ in range(5))
    return (
        "celestial predict one.jpg, cold",
        f"{took:.2f} s",
        f"its imports alone {bare:.2f} s",
        f"{took / bare:.2f} ×",
    )


def onnx_against_keras(run: str) -> list[Row]:
    "One answer by the served file on one thread, against `keras.Model.predict`."
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import numpy as np
    import pandas as pd

    from celestial_ml.data.images import decode_image
    from celestial_ml.serve.predictor import Predictor

    folder = Path("output") / run
    path = pd.read_parquet(folder / "predictions.parquet").path[0]
    content = (project_root() / path).read_bytes()
    picture, pixels = decode_image(content), np.load(folder / "pixels.npy")[:1]
    predictor, model = Predictor(folder, threads=1), keras.saving.load_model(folder / "model.keras")
    onnx = median_ms(lambda: predictor.run(picture), 300)
    whole = median_ms(lambda: predictor.predict(content), 300)
    predict = median_ms(lambda: model.predict(pixels, verbose=0), 20)
    return [
        (
            "one picture, ONNX Runtime, one thread",
            f"{onnx:.2f} ms",
            f"keras predict {predict:.1f} ms",
            f"1/{predict / onnx:.0f}",
        ),
        (
            "the same, decoding the file included",
            f"{whole:.2f} ms",
            f"keras predict {predict:.1f} ms",
            f"1/{predict / whole:.0f}",
        ),
    ]


def int8_against_float(run: str) -> list[Row]:
    "The int8 file, calibrated on training images, against the float32 one, on the measured images."
    import onnx
    import pandas as pd

    from celestial_ml.core.files import read_json
    from celestial_ml.data.images import decode_image
    from celestial_ml.model.compress import compare_files, quantize

    folder, root = Path("output") / run, project_root()
    about, features = read_json(folder / "model.json"), pd.read_parquet(folder / "features.parquet")
    learned = features[features.split == "train"]
    learned = learned.sample(min(100, len(learned)), random_state=0)
    measured = pd.read_parquet(folder / "predictions.parquet")
    small = quantize(onnx.load(folder / "model.onnx"), [decode_image(root / path) for path in learned.path])
    table = compare_files(
        {"float32": folder / "model.onnx", "int8": small.SerializeToString()},
        [decode_image(root / path) for path in measured.path],
        measured.label.tolist(),
        about["classes"],
        about["ood_threshold"],
    )
    full, int8 = table.loc["float32"], table.loc["int8"]
    return [
        ("the int8 file, size", f"{int8.kB:.0f} kB", f"float32 {full.kB:.0f} kB", f"1/{int8.times_smaller:.1f}"),
        ("the same, one picture", f"{int8.ms:.2f} ms", f"float32 {full.ms:.2f} ms", f"{int8.times_as_long:.2f} ×"),
        (
            f"the same, accuracy on {len(measured)} images",
            f"{int8.accuracy:.2%}",
            f"float32 {full.accuracy:.2%}",
            f"{100 * (int8.accuracy - full.accuracy):+.2f} points",
        ),
    ]


_UP_TO_TRAIN = """
import sys
from pathlib import Path
from celestial_ml.flow.pipeline import make_plan, execute
settings = [f"data.per_class={sys.argv[1]}", "train.epochs=2"]
execute(make_plan(Path.cwd(), "default", settings, sys.argv[2], force=True, until="train"))
"""


def scaling(per_class: int) -> Row:
    "Rendering, preparing and two epochs of training: seconds and peak memory, by the number of images."
    run, images = f"bench-{10 * per_class}", 10 * per_class
    with tempfile.TemporaryDirectory() as home:
        os.environ["CELESTIAL_HOME"] = home
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", _UP_TO_TRAIN, str(per_class), run], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
    if status:
        sys.exit(f"the run with {images:,} images failed")
    return (
        f"{images:,} rendered images, up to two epochs",
        f"{took:.0f} s, {used.ru_maxrss / 1e6:.2f} GB",
        f"{1000 * took / images:.1f} ms an image",
        f"{used.ru_maxrss / images:.0f} kB an image",
    )


def pipeline_figures(asked: argparse.Namespace) -> list[Row]:
    "The whole way, in notebooks and without."
    return notebook_overhead(project_root(), asked.params)


def model_figures(asked: argparse.Namespace) -> list[Row]:
    "The served files of a run."
    run = measured_run(asked)
    return [cold_predict(run), *onnx_against_keras(run), *int8_against_float(run)]


def service_figures(asked: argparse.Namespace) -> list[Row]:
    "The service of a run's model."
    from bench.serving import checkout_figures, serving_figures

    if asked.against:
        return checkout_figures(asked.params, asked.against)
    return serving_figures(measured_run(asked), asked.requests)


def batch_figures(asked: argparse.Namespace) -> list[Row]:
    "Many pictures, by the model of a run."
    from bench.batch import batch_rows

    run = measured_run(asked)
    return batch_rows(Path("output") / run, Path("output") / run / "images" if run != "guide" else Path("data/raw"))


def sweep_figures(asked: argparse.Namespace) -> list[Row]:
    "Twenty runs, at once and one by one."
    from bench.sweep import sweep_rows

    return sweep_rows()


def lab_figures(asked: argparse.Namespace) -> list[Row]:
    "JupyterLab."
    from bench.lab import lab_rows

    return lab_rows()


def picture_figures(asked: argparse.Namespace) -> list[Row]:
    "Other people's pictures."
    from bench.pictures import picture_rows

    return picture_rows(asked)


def soak_figures(asked: argparse.Namespace) -> list[Row]:
    "The service under attack."
    from bench.soak import soak_rows

    return soak_rows(asked.model, asked.minutes, asked.seed or 0, asked.checkout, asked.login)


def scaling_figures(asked: argparse.Namespace) -> list[Row]:
    "More and more images."
    return [scaling(per_class) for per_class in (150, 600, 2400)]


SECTIONS = {
    "pipeline": pipeline_figures,
    "model": model_figures,
    "serving": service_figures,
    "batch": batch_figures,
    "sweep": sweep_figures,
    "lab": lab_figures,
    "pictures": picture_figures,
    "soak": soak_figures,
    "scaling": scaling_figures,
}
LONG = ("pictures", "soak", "scaling")  # half an hour, so only when they're asked for


def measured_run(asked: argparse.Namespace) -> str:
    "The run whose model is measured: what the pipeline's rows left, or one of that name."
    for run in ("bench-inline", asked.params):
        if (Path("output") / run / "model.onnx").exists():
            return run
    sys.exit(f"there is no run to measure: make run PARAMS={asked.params}, or python -m bench pipeline model")


def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all but {' and '.join(LONG)} if none is named"
    )
    parser.add_argument("--params", default="default", help="the params file that the pipeline is measured with")
    parser.add_argument("--requests", type=int, default=100_000, help="requests during which models are swapped")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="serving: beside another checkout")
    parser.add_argument("--minutes", type=float, default=20, help="soak: how long")
    parser.add_argument("--seed", type=int, help="soak: the order of the attacks; pictures: this one instead of three")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="pictures: the folder of the sets")
    parser.add_argument("--set", action="append", metavar="NAME", help="pictures: this set instead of all; repeatable")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="soak: a packaged model; else trained for seconds")
    parser.add_argument("--checkout", type=Path, metavar="FOLDER", help="soak: whose code is served; else this one's")
    parser.add_argument("--login", action="store_true", help="soak: the demo asks for a login")
    asked = parser.parse_args()
    if unknown := set(asked.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    os.chdir(project_root())
    missed = False
    for name in asked.sections or [name for name in SECTIONS if name not in LONG]:
        print(f"\n{name}: some minutes", flush=True)
        rows = SECTIONS[name](asked)
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        for row in rows:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        missed |= any(row[3].endswith("MISSED") for row in rows)
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
