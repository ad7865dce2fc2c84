"""How many labels a model needs: learning curves of the strategies against random, and what a new class takes.

`python -m bench.labelling --data FOLDER [--network compact|frozen] [--strategy NAME]… [--new CLASS]… [--seed N]…`. FOLDER
holds a folder of images a class; each figure is a line of JSON. With `compact` each round trains our own network on, by a
warm start, as a labelling project does; with `frozen` a linear head is fitted anew on features of EfficientNet-Lite0.
Accuracy is on held-out images that nobody labels. `python -m bench.labelling --plot RESULTS PICTURE` draws the curves.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from celestial_ml.core.params import Model, Prepare, Train
from celestial_ml.core.seeds import set_seed
from celestial_ml.data.catalog import image_files
from celestial_ml.data.images import decode_image
from celestial_ml.data.prepare import Preparer
from celestial_ml.label.strategies import STRATEGIES, Pool, like_new, order
from celestial_ml.model.evaluate import logits_and_embeddings, softmax, with_embedding
from celestial_ml.model.networks import build_network
from celestial_ml.model.pretrained import _fit_embedding, cached_features
from celestial_ml.model.train import class_weights, fit
from celestial_ml.model.unknown import false_alarm_threshold, fit_distance
from celestial_ml.model.warm_start import warm_start

STEP, MOST, GOAL = 50, 500, 350  # labels of a round, of random, and with which a strategy has to be as good
ROUND = 10  # labels between two orders of the queue, as the page has it
COMPACT = Model(network="compact")
Answer = tuple[np.ndarray, np.ndarray]  # probabilities (n, classes), embeddings (n, d)


class Compact:
    "Our own network, which goes on from round to round."

    first = ()  # counts of labels below `STEP`, at which it learns

    def __init__(self, pixels: np.ndarray, seed: int, steps: int):
        self.pixels, self.seed, self.steps = pixels, seed, steps
        self.model, self.classes = None, np.zeros(0, int)

    def learn(self, rows: np.ndarray, labels: np.ndarray) -> None:
        "Train on with all labels."
        set_seed(self.seed, tensorflow=True)
        classes = np.unique(labels)
        model = build_network(COMPACT, self.pixels.shape[1:], len(classes))
        if self.model is not None:
            warm_start(model, [*map(str, classes)], self.model, [*map(str, self.classes)])
        steps = -(-len(rows) // 16)
        train = Train(augment="sky", epochs=max(2, round(self.steps / steps)))
        none = self.pixels[:0], np.zeros(0, int)
        fit(model, (self.pixels[rows], np.searchsorted(classes, labels)), none, train, self.seed)
        self.model, self.classes = model, classes

    def answer(self, rows: np.ndarray) -> Answer:
        "What the network answers."
        assert self.model is not None
        logits, embeddings = logits_and_embeddings(with_embedding(self.model), self.pixels[rows])
        return softmax(logits), embeddings


class Frozen:
    "A linear head on an embedding that never changes, as `model.network=efficientnet_lite0` has it."

    first = (10, 20, 30, 40)
    features: np.ndarray | None = None

    def __init__(self, pixels: np.ndarray, seed: int, steps: int):
        if Frozen.features is None:  # of the one data set that a process measures
            built = build_network(Model(network="efficientnet_lite0"), pixels.shape[1:], 2)
            features = cached_features(built, pixels)
            _fit_embedding(built, features)
            Frozen.features = np.asarray(built.get_layer("embedding")(features))
        self.seed, self.classes = seed, np.zeros(0, int)

    def learn(self, rows: np.ndarray, labels: np.ndarray) -> None:
        "Fit the head anew."
        from sklearn.linear_model import LogisticRegression

        self.classes = np.unique(labels)
        weights = class_weights(np.searchsorted(self.classes, labels), len(self.classes), "auto")
        weights = None if weights is None else dict(zip(self.classes, weights, strict=True))
        self.head = LogisticRegression(C=0.1, max_iter=300, class_weight=weights)
        self.head.fit(self.features[rows], labels)

    def answer(self, rows: np.ndarray) -> Answer:
        "What the head answers."
        return self.head.predict_proba(self.features[rows]), self.features[rows]


def typiclust(pool: Pool, rng: np.random.Generator) -> np.ndarray:
    "scikit-activeml's TypiClust, beside ours."
    from skactiveml.pool import TypiClust

    x = np.concatenate([pool.embeddings, pool.labelled])
    y = np.concatenate([np.full(len(pool.embeddings), np.nan), np.zeros(len(pool.labelled))])
    chosen = TypiClust(random_state=int(rng.integers(2**31))).query(x, y, batch_size=min(STEP, len(pool.embeddings)))
    ranks = np.full(len(pool.embeddings), np.inf)
    ranks[chosen] = np.arange(len(chosen))
    return ranks


STRATEGIES["skactiveml-typiclust"] = typiclust


def read(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    "The pixels of every image, its class's number, and the classes."
    prepare, files = Preparer(Prepare(size=size)), image_files(folder)
    pixels = [prepare(decode_image(path)) for paths in files.values() for path in paths]
    numbers = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    return np.stack(pixels), numbers, [*files]


def parted(labels: np.ndarray, seed: int, share: float = 0.3) -> tuple[np.ndarray, np.ndarray]:  # pool, held out
    "Every class parted alike."
    rng = np.random.default_rng(seed)
    held = [
        rng.permutation(np.flatnonzero(labels == c))[: round(share * (labels == c).sum())] for c in np.unique(labels)
    ]
    out = np.concatenate(held)
    return np.setdiff1d(np.arange(len(labels)), out), out


def curve(make: Callable[[], Any], labels: np.ndarray, strategy: str, seed: int, most: int) -> dict[int, float]:
    "Accuracy on held-out images by the number of labels."
    pool, held = parted(labels, seed)
    model, rng, curve = make(), np.random.default_rng(seed), {}
    known = np.ones(len(labels), bool)
    labelled = np.zeros(0, int)
    first = "random" if strategy == "random" else "typical" if strategy in ("auto", "typical") else "random"
    for count in [*model.first, *range(STEP, most + 1, STEP)]:
        rest = np.setdiff1d(pool, labelled)
        step = min(count, len(pool)) - len(labelled)
        if step <= 0:
            break
        if not len(labelled):  # nothing has been learned; an untrained network's embedding says nothing either
            space = (
                model.features[rest]
                if hasattr(model, "features")
                else model.pixels[rest, ::8, ::8].reshape(len(rest), -1) / 255
            )
            waiting = Pool(np.ones((len(rest), 1)), space, known[rest], space[:0], np.zeros(0, str))
            chosen = order(first, waiting, seed)[:step]
        else:
            probabilities, space = model.answer(rest)
            waiting = Pool(probabilities, space, known[rest], model.answer(labelled)[1], labels[labelled].astype(str))
            chosen = order(strategy, waiting, int(rng.integers(2**31)))[:step]
        labelled = np.concatenate([labelled, rest[chosen]])
        model.learn(labelled, labels[labelled])
        answers = model.classes[model.answer(held)[0].argmax(axis=1)]
        curve[len(labelled)] = float((answers == labels[held]).mean())
    return curve


def new_class(make: Callable[[], Any], labels: np.ndarray, body: int, seed: int, most: int = 30) -> dict[str, float]:
    "A class is new: recall with so many labels that `auto` chooses, and the accuracy of the old classes before and after."
    pool, held = parted(labels, seed)
    old, rng = pool[labels[pool] != body], np.random.default_rng(seed)
    old = rng.permutation(old)
    learned, others = old[: 2 * len(old) // 3], old[2 * len(old) // 3 :]  # the rest waits, unlabelled, with the new one
    waiting = np.concatenate([others, pool[labels[pool] == body]])
    model = make()
    model.learn(learned, labels[learned])
    space = model.answer(learned)[1]
    distance = fit_distance(space, labels[learned])
    check = held[labels[held] != body]
    before = float((model.classes[model.answer(check)[0].argmax(axis=1)] == labels[check]).mean())
    threshold = false_alarm_threshold(distance(model.answer(others[: len(others) // 2])[1]), 0.02)
    probabilities, vectors = model.answer(waiting)
    scores = distance(vectors)
    known, classes, chosen = scores <= threshold, {*model.classes.astype(str)}, np.zeros(0, int)
    while len(chosen) < min(most, len(waiting)):  # as the page does it: ordered anew after some labels
        rest, named = np.setdiff1d(np.arange(len(waiting)), chosen), labels[waiting[chosen]].astype(str)
        like = like_new(vectors[rest], vectors[chosen], named, classes)
        open_ = Pool(probabilities[rest], vectors[rest], known[rest] & ~like, vectors[chosen], named)
        chosen = np.concatenate([chosen, rest[order("auto", open_, seed)[:ROUND]]])
    rows = np.concatenate([learned, waiting[chosen]])
    model.learn(rows, labels[rows])
    answers = model.classes[model.answer(held)[0].argmax(axis=1)]
    right, new = answers == labels[held], labels[held] == body
    return {
        "recall": float(right[new].mean()), "of the labels, new": int((labels[waiting[chosen]] == body).sum()),
        "old before": before, "old after": float(right[~new].mean()),
    }  # fmt: skip


def labels_needed(points: dict[str, float], goal: float) -> int | None:  # None: it never gets there
    "The labels from which the accuracy stays at a goal."
    short = [int(count) for count, accuracy in points.items() if accuracy < goal]
    return next((int(count) for count in points if int(count) > max(short, default=0)), None)


def plot(results: Path, picture: Path) -> None:
    "Draw the curves: a panel for each data set and network, a line for each strategy, from the worst to the best seed."
    import matplotlib.pyplot as plt

    rows = [row for line in results.read_text().splitlines() if "accuracy" in (row := json.loads(line))]
    panels = list(dict.fromkeys((row["data"], row["network"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained", squeeze=False)
    colours = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(row["strategy"] for row in rows))}
    for axis, panel in zip(axes[0], panels, strict=True):
        mine = [row for row in rows if (row["data"], row["network"]) == panel]
        for name, colour in colours.items():
            curves = [row["accuracy"] for row in mine if row["strategy"] == name]
            if not curves:
                continue
            counts, values = [*map(int, curves[0])], np.array([[*curve.values()] for curve in curves])
            axis.plot(
                counts,
                values.mean(axis=0),
                color=colour,
                label=f"{name} ({len(curves)})",
                lw=2 if name in ("random", "auto") else 1,
            )
            axis.fill_between(counts, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.1, lw=0)
        goal = np.mean([[*row["accuracy"].values()][-1] for row in mine if row["strategy"] == "random"])
        axis.axhline(goal, color="grey", ls=":", lw=1)
        axis.set_xscale("log")
        axis.set_xticks(ticks := [10, 20, 50, 100, 200, 500], [*map(str, ticks)])
        axis.minorticks_off()
        axis.set(
            title=f"{panel[0]}, {panel[1]} network (seeds)",
            xlabel="labels",
            ylabel="accuracy on held-out images",
        )
        axis.legend(fontsize="small", loc="lower right")
    figure.savefig(picture, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    "Measure, and print a line of JSON for each figure."
    parser = argparse.ArgumentParser(prog="bench labelling", description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RESULTS", "PICTURE"), help="draw what was measured")
    parser.add_argument("--network", choices=("compact", "frozen"), default="compact")
    parser.add_argument("--strategy", action="append")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--new", action="append", help="a class to be new, in the place of curves; all: each in turn")
    parser.add_argument("--steps", type=int, default=300, help="of the optimiser, in a round of the compact network")
    parser.add_argument("--size", type=int, default=64)
    told = parser.parse_args(arguments)
    if told.plot:
        plot(*told.plot)
        return
    if told.data is None:
        parser.error("--data or --plot")
    pixels, labels, classes = read(told.data, told.size)
    networks: dict[str, Any] = {"compact": Compact, "frozen": Frozen}
    for seed in told.seed or (7, 8, 9):

        def make(seed: int = seed) -> Any:
            return networks[told.network](pixels, seed, told.steps)

        for name in classes if told.new == ["all"] else told.new or []:
            began = time.monotonic()
            with redirect_stdout(sys.stderr):  # what training prints
                figures = new_class(make, labels, classes.index(name), seed)
            print(
                json.dumps(
                    {"data": told.data.name, "network": told.network, "seed": seed, "new": name}
                    | figures
                    | {"seconds": round(time.monotonic() - began)}
                ),
                flush=True,
            )
        for strategy in () if told.new else told.strategy or ("random", "auto", "margin"):
            began = time.monotonic()
            most = MOST if strategy == "random" else GOAL
            with redirect_stdout(sys.stderr):
                points = curve(make, labels, strategy, seed, most)
            line = {
                "data": told.data.name,
                "network": told.network,
                "seed": seed,
                "strategy": strategy,
                "accuracy": points,
            }
            print(json.dumps(line | {"seconds": round(time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
