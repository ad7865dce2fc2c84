"""From raw images to a packaged model: the pipeline of notebooks, DVC over scripts with the same code, and one script.

The scripts are the code cells of our own steps, with the parameters of the run, so that all three do the same work. The
peer is what DVC's "Get Started: Data Pipelines" describes: a stage a script in `dvc.yaml`, with its dependencies,
parameters and outputs, run by `dvc repro`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from bench import CELESTIAL, Growth, Row, in_turn, wall
from bench.sweep import copy_project
from celestial_ml.core.files import project_root
from celestial_ml.core.params import load_params
from celestial_ml.flow.steps import Task, load_tasks, step_parameters

DVC = str(Path(sys.executable).with_name("dvc"))
RUN = "bench"
CHANGED = ("explain", "stride", "explain.stride={}")  # a step, its parameter, and how `celestial run` is told


WHY = "Each step also keeps its executed notebook, and a page of it to read."


def parameters(name: str, params: Any) -> dict[str, Any]:
    "What a step is told."
    return step_parameters(name, params) | {"run": RUN, "product": None, "upstream": None, "resources_": None}


def code_of(task: Task, root: Path) -> str:
    "The code of a step's notebook, without its parameters."
    cells = json.loads((root / task.source).read_text())["cells"]
    return "\n\n".join(
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    )


def write_script(folder: Path, params: Any, tasks: dict[str, Task]) -> Path:
    "All steps in one file."
    parts = []
    for name, task in tasks.items():
        parts += [f"{key} = {value!r}" for key, value in parameters(name, params).items()] + [code_of(task, folder)]
    path = folder / "script.py"
    path.write_text("\n".join(parts))
    return path


def write_stages(folder: Path, params: Any, tasks: dict[str, Task]) -> None:
    "A script a step, `params.yaml` and `dvc.yaml`."
    (folder / "stages").mkdir(exist_ok=True)
    stages, values = {}, {}
    for name, task in tasks.items():
        values[name] = parameters(name, params)
        begin = f"import yaml\nglobals().update(yaml.safe_load(open('params.yaml'))[{name!r}])\n"
        (folder / f"stages/{name}.py").write_text(begin + code_of(task, folder))
        needs = [_files(tasks[one]) for one in task.upstream]
        stages[name] = {
            "cmd": f"{sys.executable} stages/{name}.py",
            "deps": [f"stages/{name}.py", *(path for paths in needs for path in paths)],
            "params": [name],
            "outs": _files(task),
        }
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    if not (folder / ".dvc").exists():
        wall([DVC, "init", "-q", "--no-scm"], folder)
        wall([DVC, "config", "core.analytics", "false"], folder)


def _files(task: Task) -> list[str]:
    "What a step makes beside its executed notebook."
    return [str(path) for kind, path in task.product.items() if kind not in ("notebook", "html")]


def pipeline_rows(params: str, times: int, quick: bool) -> list[Row]:
    "Cold; with nothing changed; with one parameter changed, but not in a quick run."
    root = project_root()
    with tempfile.TemporaryDirectory() as made:
        copies = {name: Path(made) / name for name in ("ours", "dvc", "script")}
        for folder in copies.values():
            copy_project(root, folder)
            (folder / "data/raw").symlink_to(root / "data/raw") if (root / "data/raw").exists() else None
        loaded, tasks = load_params(params, folder=root / "params"), load_tasks(root, RUN)
        script = write_script(copies["script"], loaded, tasks)
        write_stages(copies["dvc"], loaded, tasks)
        run = [CELESTIAL, "run", params, "--run", RUN]
        ways = {
            "ours": lambda *more: wall([*run, *more], copies["ours"], **_env(copies["ours"])),
            "dvc": lambda: wall([DVC, "repro", "-q"], copies["dvc"], **_env(copies["dvc"])),
            "script": lambda: wall([sys.executable, script], copies["script"], **_env(copies["script"])),
        }

        def cold(name: str) -> float:
            for path in ("output", ".celestial", "dvc.lock", ".dvc/cache"):
                shutil.rmtree(copies[name] / path, ignore_errors=True)
            (copies[name] / "dvc.lock").unlink(missing_ok=True)
            return ways[name]()

        first = in_turn(times, ours=lambda: cold("ours"), dvc=lambda: cold("dvc"), script=lambda: cold("script"))
        again = in_turn(1 if quick else max(3, times), ours=ways["ours"], dvc=ways["dvc"])
        one = "the same steps as one script"
        rows = [
            _row(f"raw images to a packaged model, cold ({params})", first, one, 1.0, 0.83),
            Row("nothing changed", "s", again["ours"], {"dvc repro": again["dvc"]}, goal=1.0),
        ]
        if quick:
            return rows
        step, name, told = CHANGED
        affected = {one: task for one, task in tasks.items() if one == step or step in ancestors(one, tasks)}
        values, strides = iter(range(5, 5 + 2 * times)), iter(range(5, 5 + 2 * times))
        part = write_script(copies["script"], loaded, affected)

        def changed_dvc() -> float:
            path = copies["dvc"] / "params.yaml"
            stored = yaml.safe_load(path.read_text())
            stored[step][name] = next(values)
            path.write_text(yaml.safe_dump(stored))
            return ways["dvc"]()

        changed = in_turn(
            times,
            ours=lambda: ways["ours"]("--set", told.format(next(strides))),
            dvc=changed_dvc,
            script=lambda: wall([sys.executable, part], copies["script"], **_env(copies["script"])),
        )
    return [*rows, _row(f"one parameter of `{step}` changed", changed, one, 1.0, None)]


def _row(what: str, took: dict[str, list[float]], limit: str, goal: float, share: float | None) -> Row:
    peers, most = {"DVC stages over scripts": took["dvc"]}, {limit: took["script"]}
    return Row(what, "s", took["ours"], peers, most, goal, share, WHY)


def _env(folder: Path) -> dict[str, str]:
    "Its own code, its own state."
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "MPLBACKEND": "agg", "DVC_NO_ANALYTICS": "true"}
    return {"PYTHONPATH": str(folder), "CELESTIAL_HOME": str(folder / ".celestial")} | quiet


def ancestors(name: str, tasks: dict[str, Task]) -> set[str]:
    "All steps that a step depends on."
    above = set(tasks[name].upstream)
    return above.union(*(ancestors(one, tasks) for one in above))


_UP_TO_TRAIN = """
import sys
from pathlib import Path
from celestial_ml.flow.pipeline import make_plan, execute
settings = [f"data.per_class={sys.argv[1]}", "train.epochs=2"]
execute(make_plan(Path.cwd(), "default", settings, sys.argv[2], force=True, until="train"))
"""


def scaling_rows(sizes: tuple[int, ...] = (150, 1_500, 15_000)) -> list[Growth]:
    "Rendering, preparing and two epochs of training, by the number of images."
    seconds = []
    for images in sizes:
        with tempfile.TemporaryDirectory() as home:
            os.environ["CELESTIAL_HOME"] = home
            began = time.perf_counter()
            run = [sys.executable, "-c", _UP_TO_TRAIN, str(images // 10), f"bench-{images}"]
            subprocess.run(run, stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - began)
    return [Growth("rendering, preparing and two epochs of training", list(sizes), seconds)]
