"""Dask by hand: a bag of paths, scored part by part in processes, into Parquet. Source: Dask's documentation, "Bag" and "Parquet"."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import dask.bag
import numpy as np
import onnxruntime
from PIL import Image

GROUP = 8


def score(paths: Iterator[str], model: str, classes: list[str]) -> Iterator[dict[str, object]]:
    "The best class of each picture of a part."
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # there is a process for each core
    session = onnxruntime.InferenceSession(model, options)
    [given] = session.get_inputs()
    some = list(paths)
    for i in range(0, len(some), GROUP):
        pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in some[i : i + GROUP]])
        [probabilities] = session.run(["probabilities"], {given.name: pixels})
        for path, row in zip(some[i : i + GROUP], probabilities, strict=True):
            yield {"path": path, "label": classes[int(row.argmax())], "confidence": float(row.max())}


if __name__ == "__main__":
    run, folder, out = map(Path, sys.argv[1:])
    classes = json.loads((run / "model.json").read_text())["classes"]
    paths = sorted(map(str, folder.rglob("*.jpg")))
    bag = dask.bag.from_sequence(paths, npartitions=4 * (os.cpu_count() or 1))
    answers = bag.map_partitions(score, str(run / "model.onnx"), classes)
    answers.to_dataframe(meta={"path": str, "label": str, "confidence": float}).to_parquet(out)
