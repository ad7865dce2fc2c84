"Three hundred classes: what would grow with them, or with their square, stays small, and says what it leaves out."

import io
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from celestial_ml.core.many_classes import FEW, MANY, PAIRS
from celestial_ml.data.sheet import contact_sheet, save_sheet, some_of_each
from celestial_ml.demo.performance import confusion_table, pairs_table
from celestial_ml.model.error_analysis import confused_pairs
from celestial_ml.model.evaluate import compute_metrics, predictions_table
from celestial_ml.model.explain import EXPLAINED, choose_explained, plot_explanations
from celestial_ml.model.plots import plot_confusion, plot_preview, save_figure
from celestial_ml.model.slices import bootstrap_intervals, plot_slices, slice_table
from celestial_ml.model.unknown import fit_distance
from celestial_ml.package.answer_examples import write_performance
from celestial_ml.package.manifest import Manifest
from celestial_ml.reports.model_card import make_card

SIDE, BYTES = 2000, 1_000_000  # of a picture
EACH = 6


def answers(classes: list[str], right: float = 0.6) -> pd.DataFrame:
    "The predictions of a middling model, `EACH` images a class."
    rng = np.random.default_rng(len(classes))
    truth = np.repeat(np.arange(len(classes)), EACH)
    answered = np.where(rng.random(len(truth)) < right, truth, rng.integers(0, len(classes), len(truth)))
    about = pd.DataFrame({"path": [f"{i}.png" for i in range(len(truth))], "label": np.array(classes)[truth]})
    return predictions_table(
        about, 4 * np.eye(len(classes))[answered] + rng.random((len(truth), len(classes))), classes
    )


def names(count: int) -> list[str]:
    "Class names, short and long."
    return [f"{i:04d}" + "-of-a-kind" * (i % 4) for i in range(count)]


def saved(figure: Figure, folder: Path) -> Image.Image:
    "The figure as a file, which is small enough."
    assert max(figure.get_size_inches()) * 110 <= SIDE, "no need to make it coarser"
    save_figure(figure, path := folder / "figure.png")
    assert path.stat().st_size <= BYTES
    image = Image.open(path)
    assert max(image.size) <= SIDE
    return image


@pytest.fixture(scope="module")
def crowd() -> pd.DataFrame:
    return answers(names(300))


@pytest.mark.parametrize("count", [2, 10, MANY, MANY + 1, 62, 300, 1000])
def test_the_matrix_is_a_picture_of_bounded_size(tmp_path: Path, count: int) -> None:
    figure = plot_confusion(answers(names(count)), names(count))
    assert len(figure.axes) == (1 if count <= MANY else 2)
    numbers = sum(int(text.get_text()) for text in figure.axes[0].texts)
    assert numbers == (EACH * count if count <= MANY else 0)
    saved(figure, tmp_path)


def test_the_matrix_of_many_shows_where_the_mistakes_are(tmp_path: Path) -> None:
    classes = names(200)
    table = answers(classes, right=1.0)
    table.loc[:4, "predicted"] = classes[150]
    table["correct"] = table.label == table.predicted
    figure = plot_confusion(table, classes)
    image, pairs = figure.axes
    red, green, blue = image.images[0].get_array()[0, 150]
    assert red > 0.5 > max(green, blue), "a mistake is red"
    assert image.images[0].get_array()[60, 60, 2] > image.images[0].get_array()[60, 60, 0], "a right answer is blue"
    assert [bar.get_width() for bar in pairs.patches] == [5]
    saved(figure, tmp_path)


@pytest.mark.parametrize("name", ["$x$ and $\\frac$", "a\nb\tc", "n" * 260, "\\%s{}"], ids=range(4))
def test_any_name_can_stand_in_a_figure(tmp_path: Path, name: str) -> None:
    for count in (2, MANY + 1):
        classes = [*names(count - 1), name]
        table = answers(classes)
        saved(plot_confusion(table, classes), tmp_path)
    pixels = np.zeros((len(table), 16, 16, 3), np.uint8)
    saved(plot_preview(table.iloc[-6:], pixels[-6:], columns=3), tmp_path)
    saved(plot_slices(slice_table(table, table)), tmp_path)
    contact_sheet(pixels[:3], [name] * 3, columns=3)


def test_slices_of_many_classes(tmp_path: Path, crowd: pd.DataFrame) -> None:
    slices = slice_table(crowd, crowd)
    assert len(slices) >= 300, "all of them are in the figures"
    figure = plot_slices(slices)
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels() if text.get_text().startswith("class: ")]
    assert len(shown) == FEW and "20 of 300" in figure.axes[0].get_title()
    saved(figure, tmp_path)


def test_explanations_have_a_budget(tmp_path: Path, crowd: pd.DataFrame) -> None:
    chosen = choose_explained(crowd, per_class=3)
    assert len(chosen) == EXPLAINED and not chosen.correct.any(), "the mistakes come first"
    assert len(choose_explained(answers(names(10)), per_class=1)) == 10
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (EXPLAINED, 64, 64, 3), np.uint8)  # the worst case for a PNG
    near = [pixels[:3]] * EXPLAINED
    saved(plot_explanations(pixels, chosen, {"a": rng.random((EXPLAINED, 64, 64))}, near), tmp_path)


@pytest.mark.parametrize("count", [2, 10, 62, 3000])
def test_a_contact_sheet_has_a_largest_size(tmp_path: Path, count: int) -> None:
    labels = pd.Series(np.repeat(names(count), 12))
    chosen = some_of_each(labels, each=10, most=170)
    assert len(chosen) <= 170 and labels[chosen].nunique() == min(count, 170)
    if count <= 10:
        assert len(chosen) == 10 * count
    noise = np.random.default_rng(0).integers(0, 256, (len(chosen), 128, 128, 3), np.uint8)
    save_sheet(contact_sheet(noise, list(labels[chosen]), columns=10), path := tmp_path / "sheet.png")
    assert path.stat().st_size <= BYTES and max(Image.open(path).size) <= SIDE


def test_a_distance_needs_no_memory_for_all_at_once() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(300), 6)
    distance = fit_distance(rng.normal(size=(1800, 64)).astype(np.float32), labels)
    asked = rng.normal(size=(6000, 64)).astype(np.float32)
    tracemalloc.start()
    distances = distance(asked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6, "6,000 × 300 × 64 numbers are 460 MB"
    assert np.allclose(distance(asked[:7]), distances[:7])


def test_the_figures_of_many_classes_are_quick_and_light(crowd: pd.DataFrame) -> None:
    started = time.process_time()
    tracemalloc.start()
    metrics = compute_metrics(crowd, names(300))
    bootstrap_intervals(crowd, names(300), resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 10 and peak < 200e6
    assert len(metrics["per_class"]) == 300 and all(one["images"] == EACH for one in metrics["per_class"].values())
    assert len(confused_pairs(answers(names(300), right=0.0))) == PAIRS


def test_a_card_of_many_classes_is_readable(crowd: pd.DataFrame) -> None:
    classes = names(300)
    metrics = compute_metrics(crowd, classes) | {"split": "test", "images_sha256": "0" * 64}
    metrics |= {"confused": confused_pairs(crowd), "intervals": bootstrap_intervals(crowd, classes, 100)}
    about = {
        "name": "celestial", "version": "1", "classes": classes, "input": "RGB", "file": "model.onnx", "sha256": "0" * 64,
        "ood_threshold": 1.0, "temperature": 1.0, "metrics": metrics,
        "lineage": {"run": "a", "created": "now", "mlflow_run": "b", "code_revision": "c", "data_sha256": "d" * 64, "parameters": {}},
    }  # fmt: skip
    catalog = pd.DataFrame(
        {"label": sorted(classes * 6), "split": ["train", "train", "train", "train", "val", "test"] * 300}
    )
    card = make_card(
        Manifest.of(about, "model.json"), {"decision": "refuse", "reasons": ["no"], "rules": []}, catalog, [], [], {}
    )
    text, page = card.markdown(), card.html()
    assert len(text) < 20_000 and len(page) < 60_000
    assert text.count("20 of 300 are shown") == 2 and "and 280 more" in text
    worst = min(metrics["per_class"], key=lambda name: metrics["per_class"][name]["f1"])
    assert f"| {worst} |" in text, "the worst class is among those that are shown"


def test_the_demos_matrix_of_many_classes_is_a_list(tmp_path: Path, crowd: pd.DataFrame) -> None:
    read = {path: np.zeros((8, 8, 3), np.uint8) for path in crowd.path}.__getitem__
    paths = tmp_path / "performance.json", tmp_path / "performance.webp"
    sheet = write_performance(*paths, crowd, names(300), read)
    assert paths[0].stat().st_size < 100_000 and all(cell["pictures"] for cell in sheet["cells"])
    page = pairs_table(sheet)
    assert len(page) < 50_000 < len(confusion_table(names(300), np.eye(300, dtype=int).tolist()))
    few = answers(names(10))
    kept = write_performance(*paths, few, names(10), read)
    assert sum(map(sum, kept["confusion"])) == len(few), "ten classes have their matrix"


def test_a_model_that_confuses_everything_still_has_pictures(tmp_path: Path) -> None:
    pairs = [(truth, said) for truth in names(25) for said in names(25)]
    about = pd.DataFrame({"path": range(625), "label": [truth for truth, _ in pairs]})
    table = predictions_table(about, np.eye(25)[[names(25).index(said) for _, said in pairs]], names(25))
    sheet = write_performance(
        tmp_path / "a.json", tmp_path / "a.webp", table, names(25), lambda path: np.zeros((8, 8, 3), np.uint8)
    )
    assert sheet["thumbnails"]["count"] > 100


def drawn(number: int, rng: np.random.Generator) -> Image.Image:
    "A picture of a class: its number, somewhere, on its colour."
    image = Image.new("RGB", (48, 48), f"hsl({number * 137 % 360}, 60%, 35%)")
    draw = ImageDraw.Draw(image)
    draw.text(tuple(rng.integers(2, 16, 2)), f"{number}", fill="white")
    draw.rectangle([4 + number % 7 * 6, 34, 10 + number % 7 * 6, 44], fill=f"hsl({number * 71 % 360}, 90%, 70%)")
    return image


@pytest.mark.slow
def test_a_run_of_300_classes_of_6_images(tmp_path: Path, project: Path, celestial) -> None:
    "The defaults take such images; only the epochs are few."
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    for number, name in enumerate(names(300)):
        (folder / name).mkdir(parents=True)
        for i in range(EACH):
            drawn(number, rng).save(folder / name / f"{i}.png")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = celestial(
        "run", "default", "--run", "many", "--set", "data.source=folder", "--set", f"data.folder={folder}",
        "--set", "train.epochs=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 300, "seconds of the processor"
    assert after.ru_maxrss < 2e6, "in kilobytes: 2 GB"
    out = project / "output/many"
    for path in out.rglob("*.png"):
        assert path.stat().st_size <= BYTES, path
        assert max(Image.open(io.BytesIO(path.read_bytes())).size) <= SIDE, path
    assert len(list(out.rglob("*.png"))) >= 12
    for path in out.glob("*.html"):
        assert path.stat().st_size <= 5_000_000, path
    for name in ("metrics.json", "model.json", "performance.json"):
        assert (out / name).stat().st_size <= 1_000_000, name
    assert "20 of 300 are shown" in (out / "report.html").read_text()


def test_the_sheet_of_the_command_has_500_pictures_at_most(tmp_path: Path) -> None:
    for name in names(260):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16)).save(tmp_path / "photos" / name / f"{i}.png")
    command = ["data", "show", str(tmp_path / "photos"), "--output", str(tmp_path / "sheet.png")]
    done = subprocess.run(
        [Path(sys.executable).with_name("celestial"), *command],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "sheet.png").height < 3100, "26 rows, of one picture a class"
