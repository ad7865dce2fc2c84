"""The figures, as ratios measured side by side in one run: `make bench`.

Machines differ and are noisy, so every row compares ways of doing the same thing here and now, in turn. The figures of a
whole run are kept in `bench/results` and rendered into `nbs/benchmarks.md`; ratios that fell behind the committed ones are printed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import ABSENT, Growth, Row, Text
from bench.table import committed, keep, print_rows, publish, what_fell
from celestial_ml.core.files import project_root

Rows = Sequence[Row | Growth | Text]


@dataclass
class Section:
    "A part of the benchmark."

    title: str
    rows: Callable[[argparse.Namespace], Rows]
    long: bool = False  # only when it's asked for
    quick: bool = True  # part of `--quick`


def pipeline(asked: argparse.Namespace) -> Rows:
    "The whole way, in notebooks, under DVC and as one script."
    from bench.pipeline import pipeline_rows

    return pipeline_rows("smoke" if asked.quick else asked.params, asked.times, asked.quick)


def training(asked: argparse.Namespace) -> Rows:
    "Training alone."
    from bench.training import training_rows

    return training_rows(measured_run(asked), asked.times)


def models(asked: argparse.Namespace) -> Rows:
    "The served files of a run."
    from bench.models import model_rows

    return model_rows(measured_run(asked), asked.times)


def service(asked: argparse.Namespace) -> Rows:
    "The service of a run's model."
    from bench.serving import checkout_figures, serving_rows

    if asked.against:
        return checkout_figures(asked.params, asked.against)
    return serving_rows(measured_run(asked), asked.requests, asked.times, asked.quick)


def batch(asked: argparse.Namespace) -> Rows:
    "Many pictures, by the model of a run."
    from bench.batch import batch_rows

    return batch_rows(measured_run(asked), pictures_of(asked), asked.times, () if asked.quick else (1, 10, 100))


def sweep(asked: argparse.Namespace) -> Rows:
    "Twenty runs, at once and one by one."
    from bench.sweep import sweep_rows

    return sweep_rows(asked.quick)


def checks(asked: argparse.Namespace) -> Rows:
    "What is wrong with a folder of pictures."
    from bench.checks import check_rows

    return check_rows(pictures_of(asked), asked.times)


def drift(asked: argparse.Namespace) -> Rows:
    "The monitor."
    from bench.drift import drift_rows

    return drift_rows(measured_run(asked), asked.quick)


def page(asked: argparse.Namespace) -> Rows:
    "The demo."
    from bench.page import page_rows

    return page_rows(measured_run(asked), next(pictures_of(asked).rglob("*.jpg")), asked.times)


def lab(asked: argparse.Namespace) -> Rows:
    "JupyterLab."
    from bench.lab import lab_rows

    return lab_rows(asked.times)


def install(asked: argparse.Namespace) -> Rows:
    "Environments."
    from bench.install import install_rows

    return install_rows(asked.times)


def pictures(asked: argparse.Namespace) -> Rows:
    "Other people's pictures."
    from bench.pictures import picture_rows

    return picture_rows(asked)


def soak(asked: argparse.Namespace) -> Rows:
    "The service under attack."
    from bench.soak import soak_rows

    return soak_rows(asked.model, asked.minutes, asked.seed or 0, asked.checkout, asked.login)


def scaling(asked: argparse.Namespace) -> Rows:
    "More and more images."
    from bench.pipeline import scaling_rows

    return scaling_rows()


SECTIONS = {
    "pipeline": Section("From raw images to a packaged model", pipeline),
    "training": Section("Training", training, quick=False),
    "model": Section("The served files", models),
    "serving": Section("The service", service),
    "batch": Section("Batch scoring", batch),
    "sweep": Section("Many runs of the notebooks", sweep, quick=False),
    "checks": Section("Data checks", checks),
    "drift": Section("Drift", drift, quick=False),
    "page": Section("The demo", page),
    "lab": Section("JupyterLab", lab, quick=False),
    "install": Section("Installation", install, quick=False),
    "pictures": Section("Other people's pictures", pictures, long=True),
    "soak": Section("The service under attack", soak, long=True),
    "scaling": Section("More and more images", scaling, long=True),
}


def measured_run(asked: argparse.Namespace) -> Path:
    "The folder of the run whose model is measured."
    folder = Path("output") / asked.params
    if not (folder / "model.onnx").exists():
        sys.exit(f"there is no run to measure: make run PARAMS={asked.params}")
    return folder.resolve()


def pictures_of(asked: argparse.Namespace) -> Path:
    "The pictures of the measured run."
    folder = Path("data/raw") if asked.params == "guide" else measured_run(asked) / "images"
    if not any(folder.rglob("*.jpg")):
        sys.exit(f"there is no picture in {folder}: celestial data get guide, or --params default")
    return folder.resolve()


def options() -> argparse.ArgumentParser:
    "The command line."
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    long = " and ".join(name for name, section in SECTIONS.items() if section.long)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all but {long} if none is named")
    parser.add_argument("--params", default="default", help="the params file whose run is measured")
    parser.add_argument("--quick", action="store_true", help="a small part within five minutes; nothing is kept")
    parser.add_argument("--times", type=int, default=5, help="repetitions of each way; --quick: 1")
    parser.add_argument("--publish", action="store_true", help="only render nbs/benchmarks.md out of bench/results")
    parser.add_argument("--requests", type=int, default=100_000, help="requests during which models are swapped")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="serving: beside another checkout")
    parser.add_argument("--minutes", type=float, default=20, help="soak: how long")
    parser.add_argument("--seed", type=int, help="soak: the order of the attacks; pictures: this one instead of three")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="pictures: the folder of the sets")
    parser.add_argument("--set", action="append", metavar="NAME", help="pictures: this set instead of all; repeatable")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="soak: a packaged model; else trained for seconds")
    parser.add_argument("--checkout", type=Path, metavar="FOLDER", help="soak: whose code is served; else this one's")
    parser.add_argument("--login", action="store_true", help="soak: the demo asks for a login")
    return parser


def main() -> None:
    "Measure, print, keep, compare."
    parser = options()
    asked = parser.parse_args()
    if unknown := set(asked.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    os.chdir(project_root())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of the sections that import TensorFlow
    if asked.publish:
        return publish()
    if asked.quick:
        asked.times = 1
        os.environ["BENCH_QUICK"] = "1"
    all_of = [name for name, section in SECTIONS.items() if not section.long and (section.quick or not asked.quick)]
    missed, fell = False, []
    for name in asked.sections or all_of:
        ABSENT.clear()
        print(f"\n{SECTIONS[name].title}", flush=True)
        began = time.perf_counter()
        rows = SECTIONS[name].rows(asked)
        print_rows(rows)
        for peer, why in ABSENT.items():
            print(f"  absent: {peer}, {why}")
        print(f"  took {time.perf_counter() - began:.0f} s", flush=True)
        measured = [row for row in rows if not isinstance(row, tuple)]
        missed |= any(isinstance(row, tuple) and row[3].endswith("MISSED") for row in rows)
        if asked.against:
            missed |= any(isinstance(row, Row) and row.missed() for row in rows)
        elif measured:
            fell += what_fell(committed(name), measured)
        if measured and not asked.quick and not asked.against:
            keep(name, rows)
    if fell:
        print("\nfell behind the committed ratios:\n  " + "\n  ".join(fell))
    if not asked.quick and not asked.against:
        publish()
        print("\nlook:  nbs/benchmarks.md\nnext:  git diff bench/results")
    sys.exit(int(missed or bool(fell)))


if __name__ == "__main__":
    main()
