"Sweeps: checked before anything starts, side by side, isolated, resumed, and shown on one page."

import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image
from programs import chromium, is_running
from projects import Celestial
from typer.testing import CliRunner

from celestial_ml.cli.sweep import sweep_app
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import read_json
from celestial_ml.core.params import ParamsError
from celestial_ml.flow.figures import run_metrics
from celestial_ml.flow.sweep import Outcome, Sweep, only_one, plan_sweep, read_outcomes, run_sweep
from celestial_ml.flow.workers import Ended, Owner, Workers, worker_env
from celestial_ml.reports.sweep_page import rows_of, sweep_page, write_gallery

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def write_notebook(path: Path, parameters: str, *cells: str) -> Path:
    "A notebook with a parameters cell."
    made = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nbformat.write(
        nbformat.v4.new_notebook(cells=[*made, *map(nbformat.v4.new_code_cell, cells)], metadata=KERNEL), path
    )
    return path


def printed(path: Path) -> str:
    "What an executed notebook printed."
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


# ---- checked beforehand


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["smoke", "--grid", "train.lrr=1,2"],
            "--grid train.lrr=1: train.lrr is not a parameter; did you mean train.lr?",
        ),
        (["smoke", "--grid", "train.epochs=2,0"], "--grid train.epochs=0: train.epochs can't be 0"),
        (
            ["smoke", "--grid", "train.epochs=2", "--set", "train.lr=high"],
            "--set train.lr=high: train.lr can't be 'high'",
        ),
        (["smoke", "guid"], "did you mean 'guide'?"),
        (["elsewhere.yaml"], "elsewhere.yaml: train.epochs can't be 'ten'"),
        (
            ["smoke", "--grid", "train.lr=0.1,0.2", "--until", "prepare"],
            "none of these notebooks reads it: acquire, check",
        ),
        (["smoke", "--until", "prepar"], "did you mean 'prepare'?"),
        (["--notebook", "sum.ipynb", "--grid", "a=1,x"], "--grid a=x: a can't be 'x'"),
        (["--notebook", "sum.ipynb", "--grid", "aa=1,2"], "--grid aa=1: aa is not a parameter; did you mean a?"),
        (["--notebook", "sum.ipynb", "--until", "train"], "--until"),
        (["--notebook", "none.ipynb"], "there is no notebook"),
        (["smoke", "--run", "../out"], "can't be the name of a run"),
    ],
)
def test_a_mistake_is_reported_before_a_kernel_starts(at_home: Path, arguments: list[str], words: str) -> None:
    (at_home / "elsewhere.yaml").write_text("train: {epochs: ten}\n")
    write_notebook(at_home / "sum.ipynb", "a = 1")
    result = CliRunner().invoke(sweep_app, ["sweep", *arguments])
    assert result.exit_code == 2 and words in result.output and "Traceback" not in result.output
    assert not (at_home / "output").exists()


def test_an_unknown_network_is_reported_before_a_kernel_starts(at_home: Path) -> None:
    with pytest.raises(CelestialError, match="compact"):
        plan_sweep(at_home, ["smoke"], ["model.network=compct,guide"])


def test_combinations_have_readable_names_of_their_own(at_home: Path) -> None:
    (at_home / "params/five.yaml").write_text("train: {epochs: 5}\n")
    sweep = plan_sweep(at_home, ["smoke", "five"], ["train.lr=1e-3,3e-3", "data.per_class=5"], until="train", run="x")
    assert [one.plan.run for one in sweep.runs] == [
        "x/smoke_lr-0.001_per_class-5",
        "x/smoke_lr-0.003_per_class-5",
        "x/five_lr-0.001_per_class-5",
        "x/five_lr-0.003_per_class-5",
    ]
    assert [one.plan.params.train.epochs for one in sweep.runs] == [2, 2, 5, 5]
    twins = plan_sweep(at_home, ["smoke"], ["data.per_class=5,6", "explain.per_class=1"], run="x")
    assert twins.runs[0].plan.run == "x/data.per_class-5_explain.per_class-1"
    with pytest.raises(ParamsError, match="same name"):
        plan_sweep(at_home, ["smoke"], ["data.folder='a b','a-b'"], run="x")


# ---- done


TOLD = {
    "whole": 12,
    "small": 1e-3,
    "tiny": 1e-05,
    "yes": True,
    "no": False,
    "nothing": None,
    "words": ["1e-3", "null", "0x1F", "true", "07"],
    "mixed": [1, 2.0, None, True, "on"],
    "looks": "1e-3",
    "date": "2026-11-21",
    "quoted": 'it\'s "fine" \\ ünï',
}
WRITTEN = """
whole: 12
small: 1e-3
tiny: 1e-05
"yes": true
"no": false
nothing: null
words: ["1e-3", "null", "0x1F", "true", "07"]
mixed: [1, 2.0, null, true, on]
looks: "1e-3"
date: "2026-11-21"
quoted: 'it''s "fine" \\ ünï'
"""
SEEN = """
import json, os
from pathlib import Path
print(repr(dict(whole=whole, small=small, tiny=tiny, yes=yes, no=no, nothing=nothing, words=words, mixed=mixed,
                looks=looks, date=date, quoted=quoted)))
print({name: os.environ[name] for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")}, len(os.sched_getaffinity(0)))
"""
ODD = """
import os
from pathlib import Path
from celestial_ml.flow.figures import record
tried = Path("tried") / str(x)
tried.parent.mkdir(exist_ok=True)
again = tried.exists()
tried.touch()
if x == 1 and not again:
    raise RuntimeError("only the first time")
if x == 3:
    os.kill(os.getpid(), 9)
record(inverse_error=1 / x)
"""


@pytest.fixture(scope="module")
def swept(at_home: Path) -> Sweep:
    "Notebooks from elsewhere, four times: x is 1 (fails once), 0 (fails), 2 (is fine) and 3 (its kernel dies)."
    (at_home / "told.yaml").write_text(WRITTEN)
    names = ", ".join(TOLD)
    write_notebook(at_home / "types.ipynb", "\n".join(f"{name} = None" for name in TOLD), SEEN)
    write_notebook(at_home / "odd.ipynb", "x = 1\nrun = 'default'", ODD, f"print({names!r}, run)")
    sweep = plan_odd(at_home)
    run_sweep(sweep, workers=2, retries=1)
    return sweep


def plan_odd(root: Path, values: str = "1,0,2,3") -> Sweep:
    return plan_sweep(root, ["told.yaml"], [f"x={values}"], [], ["types.ipynb", "odd.ipynb"], run="odd")


def stale_of_two(root: Path) -> list[str]:
    "The stale notebooks of the run x-2."
    return list(plan_odd(root, "2").runs[0].plan.stale)


def outcome(sweep: Sweep, run: str) -> Outcome:
    return next(one for one in read_outcomes(sweep) if one.run == f"odd/{run}")


def test_types_survive_from_yaml_to_the_notebook(swept: Sweep, at_home: Path) -> None:
    seen = printed(at_home / "output/odd/x-2/types.ipynb").splitlines()[0]
    assert seen == repr(TOLD), "equal, and of the same types all the way down"
    told = printed(at_home / "output/odd/x-2/odd.ipynb")
    assert "odd/x-2" in told


def test_each_run_has_its_share_of_the_cores(swept: Sweep, at_home: Path) -> None:
    seen = printed(at_home / "output/odd/x-2/types.ipynb").splitlines()[1]
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert seen == f"{{'OMP_NUM_THREADS': '{share}', 'TF_NUM_INTRAOP_THREADS': '{share}'}} {share}"


def test_a_failed_run_is_retried_and_does_not_stop_the_others(swept: Sweep) -> None:
    assert (outcome(swept, "x-1").status, outcome(swept, "x-1").tries) == ("done", 2)
    assert (outcome(swept, "x-2").status, outcome(swept, "x-2").tries) == ("done", 1)
    failed = outcome(swept, "x-0")
    assert (failed.status, failed.tries) == ("failed", 2) and "odd failed in cell" in str(failed.error)
    assert "ZeroDivisionError: division by zero" in str(failed.error) and "output/odd/x-0/odd.ipynb" in failed.hint
    assert outcome(swept, "x-3").status == "failed" and outcome(swept, "x-3").error == "killed by signal 9"
    assert run_metrics("odd/x-2") == {"inverse_error": 0.5}


def test_every_run_is_in_mlflow_with_the_name_of_its_sweep(swept: Sweep) -> None:
    from celestial_ml.core.params import Track
    from celestial_ml.registry.tracking import mlflow_client

    client = mlflow_client(Track())
    experiment = client.get_experiment_by_name("celestial")
    assert experiment is not None
    both = client.search_runs([experiment.experiment_id], "tags.sweep = 'odd'")
    [whole], runs = ([run for run in both if ("kind" in run.data.tags) == own] for own in (True, False))
    assert whole.info.run_name == "sweep odd" and whole.info.status == "FAILED", "some of its runs failed"
    assert whole.data.metrics["runs_done"] == 2 and "x-0: failed" in whole.data.tags["mlflow.note.content"]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {whole.info.run_id}
    status = {(run.info.run_name, run.info.status) for run in runs}
    assert {("odd/x-1", "FAILED"), ("odd/x-1", "FINISHED"), ("odd/x-2", "FINISHED"), ("odd/x-0", "FAILED")} <= status
    fine = next(run for run in runs if run.info.run_name == "odd/x-2")
    assert (
        fine.data.params["x"] == "2" and fine.data.metrics["inverse_error"] == 0.5 and fine.data.metrics["seconds"] > 0
    )


def test_again_does_only_what_is_not_done(swept: Sweep, at_home: Path) -> None:
    stale = {Path(one.plan.run).name: [*one.plan.stale] for one in plan_odd(at_home, "1,0,2,5").runs}
    assert stale == {"x-1": [], "x-0": ["odd"], "x-2": [], "x-5": ["types", "odd"]}
    before = {path: path.stat().st_mtime_ns for path in (at_home / "output/odd").glob("*/*.ipynb")}
    done = plan_odd(at_home, "1,2")
    began = time.monotonic()
    outcomes = {one.run: one for one in run_sweep(done)}
    assert time.monotonic() - began < 2, "no server is started for nothing"
    assert outcomes["odd/x-1"].tries == 2 and outcomes["odd/x-0"].status == "failed", "outcomes of others are kept"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_changed_is_stale(swept: Sweep, at_home: Path) -> None:
    executed = at_home / "output/odd/x-2/types.ipynb"
    away = shutil.move(executed, at_home / "away.ipynb")
    assert stale_of_two(at_home) == ["types", "odd"], "what follows a notebook is run after it"
    shutil.move(away, executed)
    source = at_home / "odd.ipynb"
    text = source.read_text()
    source.write_text(text.replace("only the first time", "only once"))
    assert stale_of_two(at_home) == ["odd"]
    source.write_text(text)
    (at_home / "told.yaml").write_text(WRITTEN.replace("whole: 12", "whole: 13"))
    assert stale_of_two(at_home) == ["types", "odd"]
    (at_home / "told.yaml").write_text(WRITTEN)
    assert stale_of_two(at_home) == []


def test_two_commands_do_not_run_the_same_sweep(swept: Sweep) -> None:
    with only_one(swept), pytest.raises(CelestialError, match="being run already"):
        run_sweep(swept)


# ---- the page


def test_the_page_has_every_run_and_why_one_failed(swept: Sweep, at_home: Path) -> None:
    text = write_gallery("odd", read_outcomes(swept)).read_text()
    assert text.count("<tr data-run") == 4 and "2 done, 2 failed" in text
    assert re.search(r"odd, cell \d+: ZeroDivisionError: division by zero", text)
    assert "inverse_error ↓" in text and "The best is <b>x-2</b>: its inverse_error" in text
    assert text.count("<polyline") == 2 and 'role="status"' not in text, "nothing runs"
    for link in re.findall(r'href="([^"#:]+)"', text):
        assert (at_home / "output/odd" / link).is_file(), link
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text), "a page that needs no network"


CHOICE = "from celestial_ml.flow.figures import record\nrecord(val_loss=x, test_loss=1 - x, test_accuracy=x)"


def test_validation_decides_and_test_figures_never_do(project: Path, celestial: Celestial) -> None:
    "The run with the lower loss on validation images is the best, though another one has better test figures."
    write_notebook(project / "choice.ipynb", "x = 0.5", CHOICE)
    arguments = ["sweep", "--notebook", "choice.ipynb", "--grid", "x=0.25,0.75", "--run", "choice"]
    done = json.loads(celestial(*arguments, "--json").stdout)
    assert (done["best"], done["decided_by"]) == ("choice/x-0.25", "val_loss")
    printed = celestial(*arguments).stdout
    assert (
        "best: choice/x-0.25, by val_loss 0.25" in printed
        and "not for choosing: test_accuracy 0.25, test_loss 0.75" in printed
    )
    text = (project / "output/choice/index.html").read_text()
    assert "The best is <b>x-0.25</b>: its val_loss" in text and "not for choosing" in text
    row = re.search(r'<tr data-run="x-0.75".*?</tr>', text, re.S)
    assert row and "top" not in row[0] and row[0].count("number test") == 2, "no test figure is marked as the best"


def test_names_from_outside_are_no_html(at_home: Path) -> None:
    odd = Outcome("odd/a", {"x": "<script>alert(1)</script>"}, "failed", 1.0, 1, "<b>no</b>")
    page = sweep_page("<i>", rows_of([odd]), Path("output/odd/index.html")).html()
    assert "<script>alert" not in page and "<b>no</b>" not in page and "<h1>&lt;i&gt;</h1>" in page


@pytest.mark.browser
def test_the_page_is_sorted_by_the_keyboard_and_fits_a_phone(swept: Sweep) -> None:
    page_file = write_gallery("odd", read_outcomes(swept)).resolve()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        mistakes: list[str] = []
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.goto(page_file.as_uri())
        first = lambda: page.locator("tbody tr").first.get_attribute("data-run")  # noqa: E731
        header = page.get_by_role("button", name="x", exact=True)
        header.focus()
        page.keyboard.press("Enter")
        assert first() == "x-0" and page.locator("th[aria-sort=ascending]").count() == 1
        page.keyboard.press("Enter")
        assert first() == "x-3"
        page.get_by_role("button", name="inverse_error ↓").click()
        assert first() == "x-2", "runs without a figure stay last"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not mistakes
        browser.close()


# ---- isolation

POISON = """
import builtins, os, random, signal, statistics, sys, tempfile, threading, warnings
import numpy as np
import matplotlib
np.mean = lambda *_: "poison"
builtins.sorted = lambda *_: ["poison"]
statistics.mean = None
sys.modules["fractions"] = None
sys.path.insert(0, "/poison")
sys.setrecursionlimit(400)
os.environ["HOME"] = "/poison"
os.environ["POISON"] = "1"
os.chdir(tempfile.mkdtemp())
os.umask(0o777)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
random.seed(1)
np.random.seed(1)
np.seterr(all="ignore")
matplotlib.rcParams["lines.linewidth"] = 99
warnings.simplefilter("error")
handle = open(os.path.join(tempfile.gettempdir(), "poison.txt"), "w")
threading.Thread(target=threading.Event().wait, daemon=True, name="poison").start()
poison = [0] * 1000
"""
LOOK = """
import builtins, json, os, random, signal, statistics, sys, threading, warnings
import numpy as np
import matplotlib
import fractions
files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
umask = os.umask(0o22)
os.umask(umask)
seen = {
    "mean": float(np.mean([1, 3])), "sorted": sorted([2, 1]), "statistics": statistics.mean([2]),
    "environment": {k: v for k, v in os.environ.items() if k != "JPY_PARENT_PID"}, "folder": os.getcwd(), "umask": umask,
    "path": sys.path, "recursion": sys.getrecursionlimit(), "signal": str(signal.getsignal(signal.SIGUSR1)),
    "globals": [name for name in globals() if not name.startswith("_")], "errors": np.geterr(),
    "line": matplotlib.rcParams["lines.linewidth"], "backend": matplotlib.get_backend(), "arguments": len(sys.argv),
    "error filters": [f[0] for f in warnings.filters].count("error"), "main": sys.modules["__main__"].__dict__ is globals(),
    "files": [name for name in files if "poison" in name], "threads": "poison" in {t.name for t in threading.enumerate()},
    "leader": os.getsid(0) == os.getpid(),
}
random.seed(7)
np.random.seed(7)
seen["drawn"] = [random.random(), float(np.random.rand()), float(np.random.default_rng(7).normal())]
print(json.dumps(seen))
"""
UNSEEDED = "import random, numpy as np\nprint(random.random(), np.random.rand(), np.random.default_rng().normal())"
PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"


def execute(_: Owner, source: str, executed: str) -> None:
    "Be a worker: execute a notebook."
    from ploomber_engine import execute_notebook

    execute_notebook(source, executed, progress_bar=False, cwd=str(Path(executed).parent))


@pytest.fixture(scope="module")
def run_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    "Execute code as a notebook, in a worker or in a kernel of papermill's; the executed notebook."
    import papermill

    folder = tmp_path_factory.mktemp("workers")
    environment = pytest.MonkeyPatch()
    for name in {*os.environ} - {*worker_env(1)} | {"MPLBACKEND"}:
        environment.delenv(name, raising=False)
    for name, value in worker_env(1).items():
        environment.setenv(name, value)
    environment.delenv("MPLBACKEND", raising=False)
    with Workers(1, ["IPython", "ploomber_engine", "numpy", "matplotlib.pyplot", "statistics"]) as workers:

        def run(code: str, way: str = "worker") -> Path:
            source, executed = folder / "source.ipynb", folder / "executed.ipynb"
            nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=KERNEL), source)
            if way == "kernel":
                papermill.execute_notebook(source, executed, progress_bar=False, cwd=str(folder))
                return executed
            workers.start("one", execute, str(source), str(executed), log=folder / "log")
            events = []
            while workers.running:
                events += workers.events()
            [(_, ended)] = events
            assert isinstance(ended, Ended)
            assert code == POISON or (ended.code == 0 and not ended.error), (folder / "log").read_text()
            return executed

        yield run
    environment.undo()


def test_a_run_that_poisons_everything_leaves_the_next_untouched(run_code: Callable[..., Path]) -> None:
    first, kernel = json.loads(printed(run_code(LOOK))), json.loads(printed(run_code(LOOK, "kernel")))
    for _ in range(2):
        run_code(POISON)
        assert json.loads(printed(run_code(LOOK))) == first, "to the last environment variable"
    assert first["mean"] == 2 and "POISON" not in first["environment"] and first["files"] == []
    same = (
        "mean",
        "sorted",
        "statistics",
        "folder",
        "umask",
        "recursion",
        "signal",
        "errors",
        "line",
        "drawn",
        "leader",
    )
    assert {name: first[name] for name in same} == {name: kernel[name] for name in same}, "as in a kernel"


def test_who_does_not_seed_draws_anew(run_code: Callable[..., Path]) -> None:
    draws = [printed(run_code(UNSEEDED)).split() for _ in range(3)]
    assert all(len({draw[i] for draw in draws}) == 3 for i in range(3))


def test_a_plot_is_shown_as_in_any_kernel(run_code: Callable[..., Path]) -> None:
    shown = [
        [sorted(o.get("data", {})) for o in nbformat.read(run_code(PLOT, way), 4).cells[0].outputs]
        for way in ("kernel", "worker")
    ]
    assert shown[0] == [["image/png", "text/plain"]] and shown[0][0] in shown[1]


# ---- stopped


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGKILL))],
    ids=["Ctrl-C", "SIGTERM", "kill -9"],
)
def test_a_stopped_sweep_leaves_no_process_and_resumes(project: Path, at_home: Path, number: int) -> None:
    name = f"stopped-{number}"
    code = "import os, time\nfrom pathlib import Path\ntry:\n    Path(f'{name}-{i}.pid').write_text(str(os.getpid()))\n"
    code += "    time.sleep(0 if Path('go-on').exists() else 120)\nfinally:\n    Path(f'{name}-{i}.tidy').touch()"
    write_notebook(project / "sleep.ipynb", f"i = 0\nname = '{name}'", code)
    command = [str(Path(sys.executable).with_name("celestial")), "sweep", "--notebook", "sleep.ipynb"]
    command += ["--set", f"name={name}", "--grid", "i=1,2,3", "--workers", "2", "--run", name]
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    deadline = time.monotonic() + 120
    while len(list(project.glob(f"{name}-*.pid"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = [int(path.read_text()) for path in project.glob(f"{name}-*.pid")]
    pids += [int(pid) for pid in Path(children).read_text().split()]
    assert len(pids) == 4, "two workers, their server, and multiprocessing's resource tracker"
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))
    assert len(list(project.glob(f"{name}-*.tidy"))) == 2, "a cell that is stopped tidies up behind itself"
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "finished work is kept" in said and "Traceback" not in said
        assert (project / f"output/{name}/index.html").is_file()
    sweep = plan_sweep(at_home, [], ["i=1,2,3"], [f"name={name}"], ["sleep.ipynb"], run=name)
    assert [[*one.plan.stale] for one in sweep.runs] == [["sleep"]] * 3


TRAINING = ("sweep", "smoke", "--grid", "train.lr=0.003,0.01", "--until", "train", "--workers", "2", "--run", "stop")
LONG = ("--set", "train.epochs=90", "--set", "data.source=folder", "--set", "data.folder=shades")


def test_a_stopped_training_goes_on_behind_its_last_epoch(project: Path, celestial: Celestial, state: Path) -> None:
    "SIGTERM, and the same command: no epoch is done again, no run is recorded twice, and the page follows."
    from celestial_ml.flow.figures import epochs_of

    rng = np.random.default_rng(7)
    for label in range(10):
        (project / f"shades/{label}").mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 25 * (label + 1), (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(project / f"shades/{label}/{i}.png")
    page, folder = project / "output/stop/index.html", project / "output/stop"
    runs = ("stop/lr-0.003", "stop/lr-0.01")
    env = os.environ | {"CELESTIAL_HOME": str(state), "PYTHONPATH": str(project)}
    command = [str(Path(sys.executable).with_name("celestial")), *TRAINING, *LONG]
    process = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    before = Path.cwd()
    os.chdir(project)
    try:
        seen = ""
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            seen = page.read_text() if page.is_file() else ""
            if "running, in epoch" in re.sub("<[^>]+>", "", seen) and min(len(epochs_of(run)) for run in runs) >= 2:
                break
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=240)
        assert process.returncode == 130 and 'role="status"' in seen and "<polyline" in seen, "the page is live"
        left = {run: len(epochs_of(run)) for run in runs}
        assert all(2 <= epochs < 90 for epochs in left.values()), left
        stopped = page.read_text()
        assert 'role="status"' not in stopped and f"stopped in epoch {left[runs[0]]}" in stopped
        again = celestial(*TRAINING, *LONG)
        assert again.returncode == 0, again.stderr
        assert all(len(epochs_of(run)) == 90 for run in runs) and not list(folder.glob("*/.checkpoint.npz"))
    finally:
        os.chdir(before)
    database = sqlite3.connect(state / "mlflow.db")
    recorded = database.execute(
        "SELECT name, status, run_uuid FROM runs WHERE name LIKE 'stop/%' OR name = 'sweep stop' ORDER BY name"
    ).fetchall()
    assert [(name, status) for name, status, _ in recorded] == [(n, "FINISHED") for n in (*runs, "sweep stop")]
    stop = max(child.stat().st_mtime for child in (folder / "logs").iterdir())
    for name, _, run in recorded[:2]:
        query = "SELECT step, timestamp FROM metrics WHERE key = 'val_loss' AND run_uuid = ? ORDER BY timestamp, step"
        steps = database.execute(query, (run,)).fetchall()
        assert [step for step, _ in steps] == [*range(1, 91)], "each epoch once"
        pauses = [b - a for (_, a), (_, b) in pairwise(steps)]
        behind = (left[name] - 1, left[name])  # an epoch may have been recorded, and its checkpoint not written yet
        assert pauses.index(max(pauses)) in behind and stop, "it paused behind its last epoch"


# ---- plain papermill


def test_papermill_takes_the_parameters_of_a_step_from_a_file(project: Path, celestial: Celestial) -> None:
    told = celestial("params", "acquire", "smoke", "--set", "data.per_class=3", "--run", "plain")
    assert told.returncode == 0, told.stderr
    assert yaml.safe_load(told.stdout)["per_class"] == 3
    (project / "acquire.yaml").write_text(told.stdout)
    command = [str(Path(sys.executable).with_name("papermill")), "nbs/steps/01_acquire.ipynb", "out.ipynb"]
    subprocess.run([*command, "-f", "acquire.yaml"], cwd=project, check=True, capture_output=True)
    settings = read_json(project / "output/plain/acquire.json")
    assert settings["per_class"] == 3 and settings["image_px"] == 48
    assert celestial("params", "acquier").returncode == 2


# ---- the pipeline


@pytest.mark.slow
def test_a_sweep_of_the_pipeline_makes_what_a_run_makes(project: Path, celestial: Celestial) -> None:
    result = celestial("sweep", "smoke", "--grid", "train.lr=0.003,0.01", "--run", "lr", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert [run["status"] for run in said["runs"]] == ["done", "done"] and said["best"] in ("lr/lr-0.003", "lr/lr-0.01")
    text = (project / "output/lr/index.html").read_text()
    assert "val_accuracy ↑" in text and "train.html" in text and "confusion matrix of lr-0.003" in text
    assert not (project / ".celestial/models").exists(), "a sweep registers nothing"
    again = celestial("run", "smoke", "--set", "train.lr=0.003", "--run", "lr/lr-0.003", "--json")
    assert json.loads(again.stdout)["ran"] == [], "one memory: `celestial run` knows what a sweep did"
    told = celestial("sweep", "smoke", "--grid", "train.lr=0.003,0.01", "--run", "lr").stdout
    command = shlex.split(told.partition("next:")[2])
    assert command[:3] == ["celestial", "run", "smoke"] and said["best"] in command
    registered = json.loads(celestial(*command[1:], "--json").stdout)
    assert registered["ran"] == ["register"] and registered["registered"]["model"] == "celestial/1"


@pytest.mark.slow
def test_warm_training_gives_the_weights_of_plain_papermill(project: Path, at_home: Path) -> None:
    "The same seed, the same weights, to the last bit: TensorFlow doesn't notice that it was forked."
    import keras

    result = run_sweep(plan_sweep(at_home, ["smoke"], [], [], [], "train", "warm"), workers=1)
    assert [one.status for one in result] == ["done"]
    from celestial_ml.core.params import load_params
    from celestial_ml.flow.steps import load_tasks, step_parameters

    params = load_params("smoke", folder=at_home / "params")
    env = worker_env(len(os.sched_getaffinity(0)))
    for task in load_tasks(at_home, "cold", "train").values():
        told = at_home / f"{task.name}.yaml"
        told.write_text(yaml.safe_dump(step_parameters(task.name, params) | {"run": "cold"}))
        command = [str(Path(sys.executable).with_name("papermill")), str(task.source), "out.ipynb", "-f", str(told)]
        subprocess.run(command, cwd=at_home, env=env, check=True, capture_output=True)
    warm, cold = (keras.saving.load_model(at_home / f"output/{run}/model.keras") for run in ("warm/smoke", "cold"))
    assert all(np.array_equal(a, b) for a, b in zip(warm.get_weights(), cold.get_weights(), strict=True))
    assert (at_home / "output/warm/smoke/history.csv").read_bytes() == (
        at_home / "output/cold/history.csv"
    ).read_bytes()
