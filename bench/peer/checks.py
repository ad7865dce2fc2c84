"What another tool says of a folder of pictures: `PYTHON checks.py cleanvision|dataeval FOLDER` prints JSON: seconds, and issue → paths."

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image


def readable(folder: Path) -> list[str]:
    "The files that Pillow reads to their end, for both tools stop at others."
    paths = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            Image.open(path).convert("RGB")
            paths.append(str(path))
        except Exception:
            continue
    return paths


def cleanvision(paths: list[str]) -> dict[str, list[str]]:
    from cleanvision import Imagelab

    lab = Imagelab(filepaths=paths)
    lab.find_issues(verbose=False)
    columns = [column for column in lab.issues if column.startswith("is_")]
    return {column[3:-6]: [str(path) for path in lab.issues.index[lab.issues[column]]] for column in columns}


def dataeval(paths: list[str]) -> dict[str, list[str]]:
    from dataeval.quality import Duplicates, Outliers

    pictures = [np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in paths]
    issues: dict[str, list[str]] = defaultdict(list)
    for row in Duplicates().evaluate(pictures).data().iter_rows(named=True):
        issues[f"{row['dup_type']}_duplicates"] += [paths[i] for i in row["item_indices"]]
    for row in Outliers().evaluate(pictures).data().iter_rows(named=True):
        issues[f"outlier_{row['metric_name']}"].append(paths[row["item_index"]])
    return issues


if __name__ == "__main__":
    paths = readable(Path(sys.argv[2]))
    began = time.perf_counter()
    issues = {"cleanvision": cleanvision, "dataeval": dataeval}[sys.argv[1]](paths)
    print(json.dumps({"seconds": time.perf_counter() - began, "issues": issues}))
