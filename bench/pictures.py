"""Other people's pictures: each set as a project of its own, by the defaults, beside simple classifiers and goals.

`python -m bench pictures --data FOLDER [--set NAME]… [--seed N]…`. In FOLDER, `own/NAME/CLASS/` holds the images of a set,
`photos/ANY/CLASS/` photographs of planets, and `celestial/CLASS/` the guide's images; what is missing is left out. The sets
`planets` and `guide+renders` are this project's own runs, measured on the photographs. A set takes minutes.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from bench import ABSENT, CELESTIAL, Row
from bench.serving import resident_mb
from bench.sweep import copy_project
from celestial_ml.core.files import project_root, read_json
from celestial_ml.core.params import Prepare
from celestial_ml.data.images import decode_image, find_pictures
from celestial_ml.data.prepare import Preparer
from celestial_ml.planets.bodies import BODIES
from celestial_ml.serve.predictor import Predictor

SEEDS = (7, 8, 9)
OURS = {  # set → params file, further settings
    "planets": ("default", []),
    "guide+renders": ("guide-and-renders", []),
}
GOALS: dict[str, dict[str, float]] = {  # figure → set → at least, or, where it's negative, at most
    "accuracy": {"stamps": 0.88, "letters": 0.92, "digits": 0.97},
    "wrong labels suspected": {"digits": 0.8},
    "suspects that are wrong": {"digits": 0.5},
    "minutes": {"stamps": -3, "letters": -3, "digits": -3},
    "peak GB": {"stamps": -2, "letters": -2, "digits": -2},
    "false alarms": {"stamps": -0.02, "letters": -0.02, "digits": -0.02},
    "photographs right and known": {"planets": 17, "guide+renders": 18},
    "photographs of other things unknown": {"planets": 1, "guide+renders": 1},
    "photographs wrong and known": {"planets": -0.0, "guide+renders": -0.0},
}
FOREIGN = 0.9  # of the pictures that share no class with a set, as a share that is called unknown, at least


def oriented_gradients(pixels: np.ndarray) -> np.ndarray:  # uint8 (n, 64, 64, 1) → float32 (n, 1764)
    "Histograms of nine directions in cells of 8 pixels, normalised by blocks of 2 x 2. Source: Dalal and Triggs 2005."
    down, right = np.gradient(pixels[..., 0].astype(np.float32), axis=(1, 2))
    strength, direction = np.hypot(down, right), np.arctan2(down, right) % np.pi / np.pi * 9
    low, part = np.floor(direction).astype(int) % 9, direction % 1
    bins = np.eye(9, dtype=np.float32)
    votes = (bins[low] * (1 - part)[..., None] + bins[(low + 1) % 9] * part[..., None]) * strength[..., None]
    cells = votes.reshape(len(pixels), 8, 8, 8, 8, 9).sum(axis=(2, 4))
    blocks = np.concatenate([cells[:, y : y + 7, x : x + 7] for y in (0, 1) for x in (0, 1)], axis=-1)
    for most in (0.2, 1):
        blocks = np.minimum(blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + 1e-3), most)
    return blocks.reshape(len(pixels), -1)


def hog_answers(features: pd.DataFrame, measured: Sequence[str], folder: Path) -> np.ndarray:  # str, of `measured`
    "What a support-vector machine on oriented gradients answers, by the same training images."
    prepare = Preparer(Prepare(size=64, grayscale=True))
    learned = features[features.split == "train"]
    x, y = (oriented_gradients(np.stack([prepare(decode_image(folder / path)) for path in paths]))
            for paths in (learned.path, measured))  # fmt: skip
    return np.asarray(SVC(C=10).fit(x, learned.label).predict(y))


def true_labels(paths: Sequence[str], labels: Sequence[str]) -> list[str]:
    "The labels; of files that are named by their row in scikit-learn's digits, in folders of digits, the true ones."
    if not {*labels} <= {*map(str, range(10))}:
        return list(labels)
    rows, targets = [re.match(r"\d{4}(?!\d)", Path(path).name) for path in paths], load_digits().target
    return [str(targets[int(row[0])]) if row else label for row, label in zip(rows, labels, strict=True)]


def timed_run(project: Path, params: str, name: str, settings: list[str], **env: str) -> tuple[float, float]:
    "Minutes that `celestial run` takes, and gigabytes that it and all processes below it take at most."
    command = [CELESTIAL, "run", params, "--run", name, "--json", *(word for s in settings for word in ("--set", s))]
    with tempfile.TemporaryFile("w+") as log:
        env = os.environ | {"PYTHONPATH": str(project), "CELESTIAL_HOME": f"{project}/.celestial"} | env
        began, peak = time.perf_counter(), 0.0
        process = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.DEVNULL, stderr=log)
        try:
            while process.poll() is None:
                with suppress(OSError, IndexError):  # a process of the tree has ended meanwhile
                    peak = max(peak, resident_mb(process.pid))
                time.sleep(0.2)
        finally:
            process.kill()
        if process.returncode not in (0, 1):
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read()[-3000:]}")
    return (time.perf_counter() - began) / 60, peak / 1000


def served_figures(folder: Path) -> dict[str, float]:
    "False alarms, and the latency and size of each file."
    about = read_json(folder / "model.json")
    figures = {"false alarms": about["false_alarm_rate"]}
    for name in ("float32", "int8"):
        if file := about["compression"]["files"].get(name):
            figures |= {f"{name}, ms for a picture": file["ms"], f"{name}, MB": file["kB"] / 1000}
    return figures


def own_figures(folder: Path, project: Path) -> dict[str, float]:
    "The accuracy beside the simple classifiers', and the suspected labels."
    metrics, features = (read_json(folder / "metrics.json"), pd.read_parquet(folder / "features.parquet"))
    table = pd.read_parquet(folder / "predictions.parquet")
    truth = np.array(true_labels(table.path.tolist(), table.label.tolist()))
    answers: dict[str, Any] = {"accuracy": table.predicted, "the most frequent class": table.baseline_trivial}
    answers |= {"logistic regression on colours": table.baseline_colours}
    answers |= {"logistic regression on thumbnails": table.baseline_pixels}
    answers |= {"SVM on HOG": hog_answers(features, table.path.tolist(), project)}
    figures = {name: float(np.mean(np.asarray(answer) == truth)) for name, answer in answers.items()}
    true = true_labels(features.path.tolist(), features.label.tolist())
    wrong = {path for path, label, right in zip(features.path, features.label, true, strict=True) if label != right}
    suspected = {suspect["path"] for suspect in metrics["suspected_labels"]}
    if wrong:
        figures["wrong labels suspected"] = len(wrong & suspected) / len(wrong)
        figures["suspects that are wrong"] = len(wrong & suspected) / max(1, len(suspected))
    else:
        figures["labels suspected"] = float(len(suspected))
    return figures


def pictures_of(data: Path) -> dict[str, list[tuple[Path, str]]]:  # set → path and class of each picture
    "The pictures of each set, and the photographs of planets."
    folders = {folder.name: [folder] for folder in sorted((data / "own").glob("*/"))}
    folders["photographs"] = sorted((data / "photos").glob("*/"))
    found = {
        name: [(path, path.relative_to(one).parts[0]) for one in some for path in sorted(map(Path, find_pictures(one)))]
        for name, some in folders.items()
    }
    return {name: pictures for name, pictures in found.items() if pictures}


def foreign_figures(predictor: Predictor, pictures: dict[str, list[tuple[Path, str]]], name: str) -> dict[str, float]:
    "The share of each set's pictures that is called unknown, of those that share no class with this one."
    own = {label for _, label in pictures[name]}
    return {
        f"unknown, of {other}": float(np.mean([not predictor.predict(path).known for path, _ in theirs]))
        for other, theirs in pictures.items()
        if not own & {label for _, label in theirs}
    }


def photograph_figures(predictor: Predictor, photographs: list[tuple[Path, str]]) -> dict[str, float]:
    "How many photographs of planets are right and known; what is no class of the model is to be unknown."
    bodies = [(predictor.predict(path), label) for path, label in photographs if label in BODIES]
    others = [predictor.predict(path) for path, label in photographs if label not in BODIES]
    return {
        "photographs of bodies": float(len(bodies)),
        "photographs right": float(sum(answer.label == label for answer, label in bodies)),
        "photographs right and known": float(sum(answer.label == label and answer.known for answer, label in bodies)),
        "photographs wrong and known": float(sum(answer.label != label and answer.known for answer, label in bodies)),
        "photographs of other things unknown": float(np.mean([not answer.known for answer in others])),
    }


def figures_of(name: str, seed: int, data: Path, params: str | None) -> dict[str, float]:
    "All figures of a set by one seed, in a project that is gone afterwards."
    pictures = pictures_of(data)
    with tempfile.TemporaryDirectory() as made:
        project = Path(made)
        copy_project(project_root(), project)
        file, settings = OURS.get(name, ("default", ["data.source=folder", f"data.folder={data / 'own' / name}"]))
        minutes, peak = timed_run(
            project, params or file, name, [f"seed={seed}", *settings], CELESTIAL_GUIDE_DATA=str(data / "celestial")
        )
        folder = project / "output" / name
        predictor = Predictor(folder)
        if name in OURS:
            figures = {"accuracy": read_json(folder / "metrics.json")["accuracy"]}
            figures |= photograph_figures(predictor, pictures["photographs"]) if "photographs" in pictures else {}
        else:
            figures = own_figures(folder, project) | foreign_figures(predictor, pictures, name)
        return figures | served_figures(folder) | {"minutes": minutes, "peak GB": peak}


def goal_of(figure: str, name: str) -> float | None:
    "The goal of a figure; what must not be exceeded is negative."
    return FOREIGN if figure.startswith("unknown, of") else GOALS.get(figure, {}).get(name)


def figure_row(name: str, figure: str, values: list[float]) -> Row:
    "The mean over the seeds beside the goal, and each seed's value."
    mean, goal = statistics.mean(values), goal_of(figure, name)
    each = f"{mean:.3f}" + (f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else "")
    if goal is None:
        return (f"{name}: {figure}", each, "", "")
    most = np.signbit(goal)
    reached = mean <= -goal if most else mean >= goal
    return (f"{name}: {figure}", each, f"goal {'≤' if most else '≥'} {abs(goal):g}", "reached" if reached else "MISSED")


def picture_rows(asked: argparse.Namespace) -> list[Row]:
    "The figures of the sets that are asked for, or of all."
    if asked.data is None or not asked.data.is_dir():
        sys.exit("pictures: name the folder of the sets, --data FOLDER")
    ABSENT["AutoGluon and fastai"] = "their image classifiers fetch pretrained weights from a hub when they run"
    data, rows = asked.data.resolve(), list[Row]()
    sets = [name for name in pictures_of(data) if name != "photographs"]
    sets += [name for name in OURS if name == "planets" or (data / "celestial").is_dir()]
    if unknown := {*(asked.set or ())} - {*sets}:
        sys.exit(f"pictures: there is no set {', '.join(sorted(unknown))} in {data}; there are {', '.join(sets)}")
    params = None if asked.params == "default" else asked.params
    for name in asked.set or sets:
        seeds = []
        for seed in [asked.seed] if asked.seed is not None else SEEDS:
            seeds.append(figures_of(name, seed, data, params))
            print(f"  {name}, seed {seed}: {seeds[-1]['minutes']:.1f} minutes", file=sys.stderr, flush=True)
        rows += [figure_row(name, figure, [values[figure] for values in seeds]) for figure in seeds[0]]
    return rows
