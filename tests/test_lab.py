"""`make lab`: what it sets up, and JupyterLab in a real browser: open a step, run all, change a parameter, compare.

`CELESTIAL_SCREENSHOTS=1` writes the pictures of the documentation to nbs/images.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import matplotlib as mpl
import pandas as pd
import pytest
from PIL import Image
from programs import chromium, free_port, git
from projects import ROOT, copy_project

from celestial_ml.core.files import read_json, sha256_of, write_json
from celestial_ml.core.params import load_params
from celestial_ml.flow.freshness import inputs_file
from celestial_ml.flow.pipeline import Plan
from celestial_ml.flow.steps import load_tasks, step_parameters
from celestial_ml.label.store import read_judgements
from celestial_ml.workbench.lab import ASSETS
from celestial_ml.workbench.status_panel import pipeline_states, where_am_i

SCREENSHOTS = ROOT / "nbs" / "images" if os.environ.get("CELESTIAL_SCREENSHOTS") else None
UP_TO_TRAIN = """
from pathlib import Path
from celestial_ml.flow.pipeline import make_plan, execute
execute(make_plan(Path.cwd(), "smoke", ["train.epochs=1"], "longer", until="train"))
"""


def command(*words: str, cwd: Path, **env: str) -> str:
    "What a command says; it must end well."
    done = subprocess.run(words, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def environment(desk: Path) -> dict[str, str]:
    "A person's environment, with a home of its own."
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "JUPYTER_"))}
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {name: str(desk.parent / "home") for name in ("HOME", "USERPROFILE")}
    return kept | own | {
        "PATH": tools,
        "PYTHONPATH": str(desk),
        "CELESTIAL_HOME": str(desk / ".celestial"),
        "JUPYTER_RUNTIME_DIR": str(desk.parent / "runtime"),
        "MPLCONFIGDIR": mpl.get_configdir(),  # its list of fonts takes seconds to make
    }  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A clone of the project."
    folder = tmp_path_factory.mktemp("lab") / "project"
    copy_project(folder)
    for name in ("Makefile", ".gitattributes", "settings.ini", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "as it was")
    (folder.parent / "home").mkdir()
    return folder


class Lab:
    "JupyterLab, as `make lab` starts it."

    def __init__(self, desk: Path, *arguments: str):
        self.log = desk.parent / "lab.log"
        self.runtime = desk.parent / "runtime"
        words = " ".join(("--no-browser", "--allow-root", f"--port={free_port()}", *arguments))
        self.began = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["make", "lab", "READY=", f"ARGS={words}"],
                cwd=desk, env=environment(desk), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def url(self) -> str:
        "Where to go in, with the token."
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            for path in self.runtime.glob("jpserver-*.json"):
                try:
                    server = read_json(path)
                    urlopen(f"{server['url']}api", timeout=5).close()
                    return f"{server['url']}?token={server['token']}"
                except (OSError, ValueError):
                    pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-3000:])

    def stop(self) -> None:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signum)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(15)


@pytest.fixture(scope="module")
def lab(desk: Path) -> Iterator[Lab]:
    lab = Lab(desk)
    lab.url()
    yield lab
    lab.stop()


# What git and Jupyter are told


def one_cell(source: str) -> str:
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": [source], "outputs": [], "execution_count": None}
    metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    return json.dumps({"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1)


def test_git_merges_by_nbdev_and_compares_by_nbdime(lab: Lab, desk: Path) -> None:
    "Both drivers come with `make lab`, in this clone only, and work where the environment isn't active."
    attributes = git(desk, "check-attr", "merge", "diff", "--", "nbs/index.ipynb")
    assert "merge: nbdev-merge" in attributes and "diff: jupyternotebook" in attributes
    notebook = desk / "nbs" / "two.ipynb"
    for branch, source in {"main": "epochs = 2", "one": "epochs = 4", "other": "epochs = 6"}.items():
        if branch != "main":
            git(desk, "checkout", "-q", "-b", branch, "main")
        notebook.write_text(one_cell(source))
        git(desk, "add", "nbs/two.ipynb")
        git(desk, "commit", "-q", "-m", source)
    shown = command("git", "diff", "one", "other", "--", "nbs/two.ipynb", cwd=desk, PATH="/usr/bin:/bin")
    assert "-  epochs = 4" in shown and "+  epochs = 6" in shown and "cell_type" not in shown
    clean = os.environ | {"PATH": f"/usr/bin:/bin:{Path(sys.executable).parent}"}
    words = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "merge", "-q", "one"]
    subprocess.run(words, cwd=desk, env=clean, capture_output=True)
    merged = json.loads(notebook.read_text())  # a plain merge leaves what is no JSON
    sources = ["".join(cell["source"]) for cell in merged["cells"]]
    assert any("epochs = 4" in source for source in sources) and any("epochs = 6" in source for source in sources)
    git(desk, "merge", "--abort")
    git(desk, "checkout", "-q", "main")
    home = desk.parent / "home"
    assert not (home / ".gitconfig").exists() and not list((home / ".jupyter").glob("*config*"))
    assert git(desk, "status", "--short") == "", "setting up changes no file of the project"


def test_the_lab_starts_without_git(tmp_path: Path) -> None:
    copy_project(tmp_path / "project")
    env = environment(tmp_path / "project") | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    said = command(sys.executable, "-m", "celestial_ml.workbench.lab", "--version", cwd=tmp_path / "project", **env)
    assert "no git repository here" in said and re.search(r"^4\.", said, re.M)
    outside = subprocess.run(
        [sys.executable, "-m", "celestial_ml.workbench.lab"],
        cwd=tmp_path,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert outside.returncode == 2 and "not inside a celestial_ml project" in outside.stderr


def test_workspace_opens_what_there_is() -> None:
    data = read_json(ROOT / ASSETS / "workspace.json")["data"]
    opened = data["layout-restorer:data"]["main"]["dock"]["widgets"]
    assert opened and all((ROOT / data[widget]["data"]["path"]).is_file() for widget in opened)
    assert (ROOT / data["file-browser-filebrowser:cwd"]["path"]).is_dir()


def test_lab_asks_nobody_outside(lab: Lab) -> None:
    "Loopback and a token, no news, no updates, no catalogue of extensions."
    server = read_json(next(lab.runtime.glob("jpserver-*.json")))
    assert server["hostname"] in ("localhost", "127.0.0.1") and len(server["token"]) >= 40
    page = urlopen(lab.url().replace("?", "lab?")).read().decode()
    config = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.S)[1])
    assert config["news"] == {"disabled": True}
    assert not config["extensionManager"]["can_install"]


# Where am I?


def kinds(name: str, run: str, root: Path, **values: object) -> dict[str, str]:
    return {step: state.kind for step, state in pipeline_states(name, run, root, values)[1].items()}


def test_where_am_i_tells_what_the_pipeline_would_do(smoke: Plan, at_home: Path) -> None:
    told = step_parameters("train", load_params("smoke"))
    assert set(kinds("train", "smoke", at_home, **told).values()) == {"fresh"}
    changed = kinds("train", "smoke", at_home, **told | {"epochs": 3})
    assert [step for step, kind in changed.items() if kind == "stale"] == [
        "train", "evaluate", "explain", "package", "register"
    ]  # fmt: skip
    picture = where_am_i("train", "smoke", None, told | {"epochs": 3}).data
    assert "epochs is 3, was 2" in picture and picture.count("you are here") == 1
    assert set(kinds("check", "nobodys", at_home).values()) == {"missing"}
    assert kinds("score", "smoke", at_home)["score"] == "missing"

    module = at_home / "celestial_ml/data/sheet.py"
    before = module.read_text()
    module.write_text(before + "\n")
    assert {"acquire", "prepare"} <= {
        step for step, kind in kinds("check", "smoke", at_home).items() if kind == "stale"
    }
    module.write_text(before)
    overlay = at_home / "params/smoke.yaml"
    overlay.write_text((text := overlay.read_text()).replace("ood_images: 6", "ood_images: 7"))
    assert kinds("check", "smoke", at_home)["evaluate"] == "stale"
    overlay.write_text(text)

    history = smoke.tasks["train"].product["history"]
    was = history.stat()
    os.utime(history, (time.time() + 60,) * 2)
    after = kinds("evaluate", "smoke", at_home)
    assert after["train"] == "by hand" and after["evaluate"] == "stale"
    os.utime(history, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert kinds("tune", "smoke", at_home)["register"] == "fresh"


def test_executed_steps_begin_with_the_picture(smoke: Plan, at_home: Path) -> None:
    "Under Ploomber what a step reads is fresh, the step runs, and what depends on it comes later."
    for name, task in smoke.tasks.items():
        cells = read_json(task.product["notebook"])["cells"]
        html = next("".join(o["data"]["text/html"]) for c in cells for o in c.get("outputs", []) if "data" in o)
        place = list(smoke.tasks).index(name)
        said = re.findall(r'title="(\w+): ([a-z ]+)', html)
        assert [step for step, _ in said] == list(smoke.tasks)
        assert [kind for _, kind in said][place] == "running"
        assert all(dict(said)[up] == "fresh" for up in task.upstream)
        assert "you are here" in task.product["html"].read_text()
        shown = "".join(
            "".join(o["data"].get("text/html", "")) for c in cells for o in c.get("outputs", []) if "data" in o
        )
        assert not re.search("<(svg|script|iframe)", shown), (
            "JupyterLab takes these from a notebook that it doesn't trust"
        )
    assert [kind for _, kind in said[:-1]] == ["fresh"] * 7


def test_where_am_i_is_quick(smoke: Plan, at_home: Path) -> None:
    "Against what it must do at least: reading the files that it judges by."
    files = [path for task in smoke.tasks.values() for path in (inputs_file(task), at_home / task.source)]

    def took(work: Callable[[], Any]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    ours = min(took(lambda: where_am_i("train", "smoke")) for _ in range(5))
    reading = min(took(lambda: [read_json(path) for path in files]) for _ in range(5))
    assert ours - reading < 0.05, f"{1000 * ours:.0f} ms, of which {1000 * reading:.0f} ms to read"


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(lab: Lab, browser: Any) -> Iterator[Any]:
    "The lab in a browser, which at the end must have had nothing to complain of, and asked nobody else."
    context = browser.new_context(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(60_000)
    page, complaints, hosts = context.new_page(), [], set()
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(lab.url())
    page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").first.wait_for()
    yield page
    context.close()
    assert not complaints
    assert hosts <= {"localhost", "127.0.0.1", None}


def panel(page: Any) -> Any:
    "The notebook in front."
    return page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")


def go(page: Any, folder: str, name: str) -> None:
    "Open a notebook by the file browser."
    page.locator(".jp-BreadCrumbs-home").first.click()
    for part in folder.split("/"):
        page.locator(f'.jp-DirListing-item[title*="Name: {part}"]').first.dblclick()
    page.locator(f'.jp-DirListing-item[title*="Name: {name}"]').dblclick()
    page.locator(f'.lm-TabBar-tab.lm-mod-current[title*="{name}"]').wait_for()
    panel(page).locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()


def run_all(page: Any, seconds: float = 180) -> None:
    "Menu Run, Run All Cells, and wait for the last one."
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        """() => {
          const shown = document.querySelector(".jp-NotebookPanel:not(.lm-mod-hidden)");
          const prompts = [...shown.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(p => p.textContent);
          return prompts.every(p => /\\d/.test(p));
        }""",
        timeout=1000 * seconds,
    )
    assert panel(page).locator('[data-mime-type="application/vnd.jupyter.stderr"]:has-text("Traceback")').count() == 0
    assert panel(page).locator(".jp-RenderedText[data-mime-type*=error]").count() == 0


def set_parameter(page: Any, name: str, value: object) -> None:
    "Type another value into the parameters cell."
    panel(page).locator(".cm-line", has_text=re.compile(f"^{name} = ")).first.click()
    page.keyboard.press("Home")
    page.keyboard.press("Shift+End")
    page.keyboard.insert_text(f"{name} = {value!r}".replace("'", '"'))


def shoot(page: Any, name: str) -> None:
    "A picture for the documentation, small enough to be committed."
    if SCREENSHOTS is None:
        return
    page.mouse.move(0, 0)
    page.screenshot(path=SCREENSHOTS / name)
    with Image.open(SCREENSHOTS / name) as image:
        image.convert("RGB").quantize(128).save(SCREENSHOTS / name, optimize=True)
    assert (SCREENSHOTS / name).stat().st_size < 200_000


@pytest.mark.browser
def test_lab_is_ready(page: Any, desk: Path) -> None:
    "The home page with its kernel, the steps beside it, a table of contents, differences, and reloaded modules."
    page.locator('.jp-DirListing-item[title*="04_train.ipynb"]').wait_for()
    page.locator(".jp-TableOfContents-tree", has_text="Your first five minutes").wait_for()
    panel(page).locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
    for button in ("checkpoint", "git"):
        assert panel(page).locator(f"jp-button[title*='nbdiff from {button}']").count() == 1
    assert page.locator(".jp-Dialog, .jp-toast").count() == 0, "nobody is asked about news"

    module = desk / "celestial_ml/tea.py"
    module.write_text("def leaves():\n    return 3\n")
    (desk / "nbs/reload.ipynb").write_text(
        one_cell('from celestial_ml.tea import leaves\n\nprint("leaves:", leaves())')
    )
    go(page, "nbs", "reload.ipynb")
    run_all(page)
    output = panel(page).locator(".jp-OutputArea-output")
    assert output.inner_text().strip() == "leaves: 3"
    module.write_text("def leaves():\n    return 12345\n")
    run_all(page)
    page.wait_for_function(
        "document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)').innerText.includes('12345')"
    )
    module.unlink()


@pytest.mark.browser
def test_a_notebook_that_others_have_run_is_whole_and_saved(page: Any, lab: Lab, desk: Path, monkeypatch: Any) -> None:
    "Untrusted, the pipeline keeps its boxes; opening a notebook of git or of a run leaves nothing to save."
    monkeypatch.chdir(desk)
    drawn = where_am_i("train", "no-such-run", None, {}).data
    executed = json.loads(one_cell("where_am_i('train', run, product)"))
    output = {"output_type": "display_data", "data": {"text/html": drawn, "text/plain": "<HTML>"}, "metadata": {}}
    executed["cells"][0] |= {"outputs": [output], "execution_count": 1}
    write_json(desk / "nbs/steps/others.ipynb", executed)
    for name in ("others.ipynb", "02_check.ipynb"):
        page.goto(lab.url().replace("?", f"lab/tree/nbs/steps/{name}?reset&"))
        panel(page).locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        page.wait_for_timeout(1000)  # for the kernel's language
        assert page.locator(".lm-TabBar-tab.jp-mod-dirty").count() == 0, name
        if name == "others.ipynb":
            steps = panel(page).locator(".where-am-i [title]")
            assert steps.count() == len(load_tasks(desk, "others")) and steps.first.is_visible()
            boxes = [step.bounding_box() for step in steps.all()]
            assert len({box["y"] for box in boxes}) == 1 and {round(box["width"]) for box in boxes} == {84}, "in a row"
            border = "border => getComputedStyle(border.lastElementChild).borderTopStyle"
            assert steps.nth(0).evaluate(border) == "dashed"
            assert "you are here" in steps.nth(3).inner_text()


@pytest.mark.browser
@pytest.mark.slow
def test_run_a_step_change_it_and_compare(page: Any, desk: Path, smoke_run: Path) -> None:
    "What the page JupyterLab of the documentation tells, by the hands of a person."
    for name in ("output", ".celestial/mlflow.db"):
        source, target = smoke_run / name, desk / name
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy2(source, target)
    command(sys.executable, "-c", UP_TO_TRAIN, cwd=desk, **environment(desk))
    once = {run: pd.read_csv(desk / f"output/{run}/history.csv") for run in ("smoke", "longer")}

    go(page, "nbs/steps", "04_train.ipynb")
    for name, value in step_parameters("train", load_params("smoke")).items():
        if value != step_parameters("train", load_params("default"))[name]:
            set_parameter(page, name, value)
    set_parameter(page, "run", "smoke")
    run_all(page)
    here = panel(page).locator(".where-am-i [title^='train: ']")
    assert here.get_attribute("title") == "train: fresh"
    assert panel(page).locator(".jp-OutputArea-output img").count() == 1, "the history"
    assert pd.read_csv(desk / "output/smoke/history.csv").equals(once["smoke"]), "the same parameters, the same history"

    set_parameter(page, "run", "longer")
    set_parameter(page, "epochs", 6)
    run_all(page)
    assert here.get_attribute("title").startswith("train: stale, epochs is 6, was 1")
    assert panel(page).locator(".where-am-i [title='prepare: fresh']").count() == 1
    here.scroll_into_view_if_needed()
    shoot(page, "lab-step.png")
    twice = {run: pd.read_csv(desk / f"output/{run}/history.csv") for run in ("smoke", "longer")}
    assert len(twice["smoke"]) == 2 and len(twice["longer"]) == 6

    page.keyboard.press("Control+s")
    panel(page).locator("jp-button[title*='nbdiff from git']").click()
    difference = page.locator(".nbdime-Widget, .jp-Notebook-diff")
    difference.get_by_text("epochs = 6").first.wait_for()
    shoot(page, "lab-diff.png")

    told = re.search(r"```python\n(.*?)```", (ROOT / "nbs/lab.md").read_text(), re.S)[1]
    (desk / "nbs/steps/compare.ipynb").write_text(one_cell(told))
    go(page, "nbs/steps", "compare.ipynb")
    run_all(page)
    table = panel(page).locator(".jp-RenderedHTMLCommon table")
    for history in twice.values():
        assert f"{history.val_loss.iloc[-1]:.3f}" in table.inner_text()
    panel(page).locator(".jp-OutputArea-output img").wait_for()
    shoot(page, "lab-compare.png")


MAP = """
from pathlib import Path
from PIL import Image
from celestial_ml.core.testing import colour_model
from celestial_ml.label.map import LabelMap, show_map
from celestial_ml.label.queue import answered_folder
from celestial_ml.serve.predictor import Predictor

folder, model = Path("map-pictures"), Path("map-model")
colour_model(model, {"Mars": 0, "Moon": 1})
folder.mkdir(exist_ok=True)
for i in range(12):
    for kind, colour in {"red": (200 + i, i, 0), "green": (i, 200 + i, 0)}.items():
        Image.new("RGB", (24, 24), colour).save(folder / f"{kind}{i}.png")
show_map(LabelMap(answered_folder(folder, Predictor(model)), "anna"))
"""


@pytest.mark.browser
@pytest.mark.slow
def test_a_lasso_on_the_map_labels_a_cluster(page: Any, lab: Lab, desk: Path) -> None:
    "The map is drawn without the internet; what lies in a lasso is shown, and labelled."
    (desk / "nbs/map.ipynb").write_text(one_cell(MAP))
    page.goto(lab.url().replace("?", "lab/tree/nbs/map.ipynb?reset&"))
    panel(page).locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
    run_all(page, 500)
    canvas, output = panel(page).locator("canvas").first, panel(page).locator(".jp-OutputArea-output").last
    canvas.wait_for()
    output.get_by_text("0 of 24 pictures selected").wait_for()
    page.wait_for_timeout(2000)  # the points are drawn
    box = canvas.bounding_box()
    left, top, right, bottom = box["x"] + 4, box["y"] + 4, box["x"] + box["width"] / 2, box["y"] + box["height"] - 4
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom), (left, top)):
        page.mouse.move(x, y, steps=25)
    page.mouse.up()
    output.get_by_text("12 of 24 pictures selected").wait_for()
    pictures = output.locator("figure img")
    assert pictures.count() == 12 and all(one.evaluate("one => one.naturalWidth") == 24 for one in pictures.all())
    output.get_by_placeholder("a class").fill("Ceres")
    output.get_by_role("button", name="Label them").click()
    output.get_by_text("12 new labels").wait_for()
    output.get_by_role("button", name="Queue them").click()
    output.get_by_text("12 new in the queue").wait_for()
    canvas.scroll_into_view_if_needed()
    shoot(page, "lab-map.png")

    rows = read_judgements(url=f"sqlite:///{desk / '.celestial/labels.db'}")
    assert {(row.label, row.annotator, row.source, row.status) for row in rows} == {
        ("Ceres", "anna", "map", "proposed")
    }
    kinds = {sha256_of(path): path.stem.rstrip("0123456789") for path in (desk / "nbs/map-pictures").glob("*.png")}
    assert len(rows) == 12 and len({kinds[row.sha256] for row in rows}) == 1, "one cluster, and all of it"
