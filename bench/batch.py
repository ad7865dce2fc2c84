"""`celestial batch` against what the machine can do, against Keras, and against itself with a hundred times the pictures.

Run as `python -m bench.batch [--memory]`, or by `make bench`.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench import CELESTIAL, Row, wall
from celestial_ml.batch.inputs import find_inputs, items
from celestial_ml.batch.job import batch
from celestial_ml.batch.scoring import GROUP, cores
from celestial_ml.core.files import project_root
from celestial_ml.data.images import decode_image
from celestial_ml.serve.predictor import Predictor


def tight_loop(model: Predictor, contents: Sequence[bytes], workers: int) -> float:
    "Pictures a second of decoding and the network alone: contents in memory, answers thrown away."

    def score(part: Sequence[bytes]) -> None:
        for i in range(0, len(part), GROUP):
            model.run_batch(np.stack([decode_image(content) for content in part[i : i + GROUP]]))

    with ThreadPoolExecutor(workers) as pool:
        began = time.perf_counter()
        list(pool.map(score, [contents[i::workers] for i in range(workers)]))
        return len(contents) / (time.perf_counter() - began)


def against_the_limit(model: Predictor, folder: Path, times: int = 5) -> Row:
    "The whole job, files and Parquet included, against the loop of what can't be left out; in turn, as machines are noisy."
    files = 4 * [item.name for item in items(find_inputs(str(folder)))]
    contents, workers, shares, rates = [Path(name).read_bytes() for name in files], cores(), [], []
    tight_loop(model, contents[:200], workers)
    for _ in range(times):
        with tempfile.TemporaryDirectory() as out:
            listed = Path(out) / "list.txt"
            listed.write_text("\n".join(files))
            before = tight_loop(model, contents, workers)
            began = time.perf_counter()
            batch(str(listed), Path(out) / "scores", model)
            rates.append(len(files) / (time.perf_counter() - began))
            shares.append(rates[-1] / statistics.mean([before, tight_loop(model, contents, workers)]))
    rate, share = statistics.median(rates), statistics.median(shares)
    return (
        f"celestial batch, {len(files):,} files to Parquet",
        f"{rate:,.0f}/s",
        f"decoding and network alone {rate / share:,.0f}/s",
        f"{share:.0%}",
    )


KERAS = """
import sys
import keras
model = keras.saving.load_model(sys.argv[1])
side, shape = model.input_shape[1], {1: "grayscale", 3: "rgb"}[model.input_shape[3]]
read = keras.utils.image_dataset_from_directory
images = read(sys.argv[2], labels=None, image_size=(side, side), color_mode=shape, batch_size=32, shuffle=False, verbose=False)
assert len(model.predict(images, verbose=0)) == int(sys.argv[3])
"""


def against_keras(run: Path, folder: Path) -> Row:
    "Two commands from a cold shell, imports included: one gives a page and a table, the other an array."
    count, ours, theirs = sum(1 for _ in items(find_inputs(str(folder)))), [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as out:
            told = [CELESTIAL, "batch", str(folder), f"{out}/scores", "--model", str(run)]
            keras = [sys.executable, "-c", KERAS, str(run / "model.keras"), str(folder), str(count)]
            for command, took in ((told, ours), (keras, theirs)):
                took.append(wall(command, TF_CPP_MIN_LOG_LEVEL="3"))
    own, other = statistics.median(ours), statistics.median(theirs)
    return (
        f"{count:,} files, from a cold shell",
        f"{own:.1f} s",
        f"keras predict {other:.1f} s",
        f"1/{other / own:.1f}",
    )


FIRST = """
import time
from celestial_ml.cli.app import app
from celestial_ml.batch import job as batch
def told(unit, answers, _write=batch.Writer.add):
    raise SystemExit(0)
batch.Writer.add = lambda self, unit, answers: told(unit, answers)
app()
"""


def start_up(run: Path, folder: Path) -> Row:
    "From the shell to the first answers, against Python's own start with the same libraries."
    first, bare = [], []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as out:
            told = [sys.executable, "-c", FIRST, "batch", str(folder), f"{out}/scores", "--model", str(run)]
            imports = [sys.executable, "-c", "import numpy, onnxruntime, PIL.Image, typer, pyarrow.parquet"]
            for command, took in ((told, first), (imports, bare)):
                took.append(wall(command))
    own, other = statistics.median(first), statistics.median(bare)
    return (
        "celestial batch, to the first answers",
        f"{own:.2f} s",
        f"its imports alone {other:.2f} s",
        f"{own / other:.2f} ×",
    )


def memory(run: Path, folder: Path, times: int) -> Row:
    "The peak for a folder, and for one with so many times its pictures, as hard links."
    peaks = []
    for repeat in (1, times):
        with tempfile.TemporaryDirectory(dir=folder.parent) as links:
            for item in items(find_inputs(str(folder))):
                for i in range(repeat):
                    name = re.sub(r"\W", "_", item.name.removeprefix(str(folder)))
                    os.link(item.name, f"{links}/{i:04}{name}.jpg")
            told = [CELESTIAL, "batch", links, f"{links}/scores", "--model", str(run)]
            process = subprocess.Popen(told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"the job with {repeat} times the pictures failed")
            peaks.append(used.ru_maxrss / 1000)
    name = f"peak memory, {times} times as many files in a folder"
    return (name, f"{peaks[1]:.0f} MB", f"once {peaks[0]:.0f} MB", f"{peaks[1] / peaks[0]:.2f} ×")


def batch_rows(run: Path, folder: Path) -> list[Row]:
    "The figures of batch scoring, but for memory, which takes minutes."
    model = Predictor(run)
    return [against_the_limit(model, folder), against_keras(run, folder), start_up(run, folder)]


def main() -> None:
    "Measure with the guide's images and the model of its run."
    root = project_root()
    os.chdir(root)
    run, folder = root / "output/guide", root / "data/raw"
    rows = [memory(run, folder, 100)] if "--memory" in sys.argv else batch_rows(run, folder)
    for row in rows:
        print("  ".join(row), flush=True)
    print(f"load {os.getloadavg()[0]:.1f} on {cores()} cores")


if __name__ == "__main__":
    main()
