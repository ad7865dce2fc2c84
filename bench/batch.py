"""`celestial batch` against what the machine can do, against Keras, and against itself with a hundred times the pictures.

The peer, and the loop that is the limit, are here in full.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench import CELESTIAL, PEER, Growth, Row, in_turn, wall
from celestial_ml.batch.inputs import find_inputs, items
from celestial_ml.batch.job import batch
from celestial_ml.batch.scoring import GROUP, cores
from celestial_ml.data.images import decode_image
from celestial_ml.serve.predictor import Predictor

WHY = (
    "The loop has the files in memory, measures nothing and writes nothing. In a profile, 14 % of the workers' time goes to "
    "reading files, 14 % to the image statistics that drift is told by, 3 % to checksums."
)


def tight_loop(model: Predictor, contents: Sequence[bytes], workers: int) -> float:
    "Pictures a second of decoding and the network alone: contents in memory, answers thrown away."

    def score(part: Sequence[bytes]) -> None:
        for i in range(0, len(part), GROUP):
            model.run_batch(np.stack([decode_image(content) for content in part[i : i + GROUP]]))

    with ThreadPoolExecutor(workers) as pool:
        began = time.perf_counter()
        list(pool.map(score, [contents[i::workers] for i in range(workers)]))
        return len(contents) / (time.perf_counter() - began)


def against_the_limit(model: Predictor, folder: Path, times: int, repeat: int = 4) -> Row:
    "The whole job, files and Parquet included, against the loop of what can't be left out; in turn, as machines are noisy."
    files = repeat * [item.name for item in items(find_inputs(str(folder)))]
    contents, workers = [Path(name).read_bytes() for name in files], cores()
    tight_loop(model, contents[:200], workers)

    def job() -> float:
        with tempfile.TemporaryDirectory() as out:
            listed = Path(out) / "list.txt"
            listed.write_text("\n".join(files))
            began = time.perf_counter()
            batch(str(listed), Path(out) / "scores", model)
            return len(files) / (time.perf_counter() - began)

    took = in_turn(times, ours=job, loop=lambda: tight_loop(model, contents, workers))
    what = f"celestial batch, {len(files):,} files to Parquet"
    loop = {"decoding and network in a loop": took["loop"]}
    return Row(what, "/s", took["ours"], {}, loop, limit_goal=0.9, why=WHY)


KERAS = """
import sys
import keras
model = keras.saving.load_model(sys.argv[1])
side, shape = model.input_shape[1], {1: "grayscale", 3: "rgb"}[model.input_shape[3]]
read = keras.utils.image_dataset_from_directory
images = read(sys.argv[2], labels=None, image_size=(side, side), color_mode=shape, batch_size=32, shuffle=False, verbose=False)
assert len(model.predict(images, verbose=0)) == int(sys.argv[3])
"""


def from_a_shell(run: Path, folder: Path, times: int) -> Row:
    "Three commands from a cold shell, imports included: a page and a table, an array, and Parquet with the best classes."
    count = sum(1 for _ in items(find_inputs(str(folder))))
    keras = [sys.executable, "-c", KERAS, str(run / "model.keras"), str(folder), str(count)]

    def ours() -> float:
        with tempfile.TemporaryDirectory() as out:
            return wall([CELESTIAL, "batch", str(folder), f"{out}/scores", "--model", str(run)])

    def dask() -> float:
        with tempfile.TemporaryDirectory() as out:
            return wall([sys.executable, PEER / "dask_scores.py", run, folder, f"{out}/scores"])

    took = in_turn(times, ours=ours, keras=lambda: wall(keras, TF_CPP_MIN_LOG_LEVEL="3"), dask=dask)
    beside = {"keras.Model.predict": took["keras"], "Dask by hand": took["dask"]}
    return Row(f"{count:,} files, from a cold shell", "s", took["ours"], beside, goal=1.0)


FIRST = """
import time
from celestial_ml.cli.app import app
from celestial_ml.batch import job as batch
def told(unit, answers, _write=batch.Writer.add):
    raise SystemExit(0)
batch.Writer.add = lambda self, unit, answers: told(unit, answers)
app()
"""


def start_up(run: Path, folder: Path, times: int) -> Row:
    "From the shell to the first answers, against Python's own start with the same libraries."
    imports = [sys.executable, "-c", "import numpy, onnxruntime, PIL.Image, typer, pyarrow.parquet"]

    def ours() -> float:
        with tempfile.TemporaryDirectory() as out:
            return wall([sys.executable, "-c", FIRST, "batch", str(folder), f"{out}/scores", "--model", str(run)])

    took = in_turn(times, ours=ours, bare=lambda: wall(imports))
    return Row("celestial batch, to the first answers", "s", took["ours"], {}, {"its imports alone": took["bare"]})


# From a small process: Linux counts the memory of the process that starts another one as the other's, too.
_PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


@contextmanager
def many(folder: Path, times: int) -> Iterator[str]:
    "A folder with so many times the pictures of another, as hard links."
    with tempfile.TemporaryDirectory(dir=folder.parent) as links:
        for item in items(find_inputs(str(folder))):
            name = re.sub(r"\W", "_", item.name.removeprefix(str(folder)))
            for i in range(times):
                os.link(item.name, f"{links}/{i:04}{name}.jpg")
        yield links


def growth(run: Path, folder: Path, repeats: tuple[int, ...]) -> list[Row | Growth]:
    "Seconds and peak memory for a folder, and for ones with ten and a hundred times its pictures."
    peaks, seconds, count = [], [], sum(1 for _ in items(find_inputs(str(folder))))
    for times in repeats:
        with many(folder, times) as links:
            told = [CELESTIAL, "batch", links, f"{links}/scores", "--model", str(run)]
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", _PEAK, *told], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"the job with {times} times the pictures failed: {done.stderr[-1000:]}")
            seconds.append(time.perf_counter() - began)
            peaks.append(int(done.stdout) / 1000)
    what = f"peak memory for {repeats[-1]} times as many files"
    memory = Row(what, "MB", peaks[-1:], {f"for {count * repeats[0]:,} files": peaks[:1]}, goal=0.8)
    return [memory, Growth("celestial batch", [count * times for times in repeats], seconds)]


def batch_rows(run: Path, folder: Path, times: int, repeats: tuple[int, ...]) -> list[Row | Growth]:
    "All figures of batch scoring."
    model = Predictor(run)
    rows: list[Row | Growth] = [against_the_limit(model, folder, times), from_a_shell(run, folder, times)]
    rows.append(start_up(run, folder, times))
    return rows + (growth(run, folder, repeats) if repeats else [])
