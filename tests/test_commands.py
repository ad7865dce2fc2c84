"""What the README, the guides and the other pages say to type, typed: as printed, in order, in a fresh clone.

The clone's params files are small, so that a run takes seconds; nothing else differs. What is not typed here has its reason
in NOT_TYPED. tests/test_guides.py runs the guides at their own size.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pandas as pd
import pytest
import yaml
from printed import HANDWRITTEN, NBS, ROOT, lines_of
from programs import free_port, git
from projects import guide_folder, snapshot

from celestial_ml.planets.source import write_rendered

# The pages in an order in which each finds what it needs: the README comes first, as for a reader.
GUIDES = sorted((NBS / "guides").glob("*.ipynb"))
PAGES = [ROOT / "README.md", NBS / "lab.md", *GUIDES, *(page for page in HANDWRITTEN if page.stem != "lab")]
SMALL = {
    "data": {"per_class": 12, "image_px": 48},
    "prepare": {"size": 32},
    "model": {"network": "compact", "width": 8, "embedding": 16},
    "train": {"epochs": 2, "augment": "none"},
    "evaluate": {"bootstrap": 200, "ood_images": 6},
    "stress": {"corrupted": 10},
    "tune": {"trials": 3, "tune_epochs": 2},
    # Whatever was trained for seconds becomes champion, as the default does at its own size.
    "register": {
        **dict.fromkeys(("min_accuracy", "min_macro_f1", "min_class_f1", "min_slice"), 0.0),
        **dict.fromkeys(("max_slice_gap", "max_ece", "max_false_alarms"), 1.0),
        **{"max_ms": 1000.0, "must_beat": []},
    },
}
NOT_TYPED = {  # pattern → why
    r"git clone|source |make setup|celestial new \.\./|celestial data check$": "the path that tests/test_readme.py types",
    r"make (serve|lab|mlflow)|celestial ui|git (diff|merge)": "serve until stopped: tests/test_readme.py, tests/test_lab.py",
    r"make (test|check|bench|guides|docs|export|lock|clean)|pytest|nbdev_update": "what develops the project, and its tests",
    r"make (secrets|audit|dist|gate|image|deploy|monitor|retrain)": "what the workflows call",
    r"make PYTHON=": "makes an environment with another Python",
    r"pip install": "changes the environment that runs the tests",
    r"docker": "tests/test_container.py builds and runs it",
    r"python -m bench": "measures for minutes to hours, on a quiet machine",
    r".*\b(NAME|MODEL|RUN|OLD|NEW|SHA256)\b": "a name to fill in",
    r".*…( |$)": "the rest is elsewhere",
    r".*output/(guide-|signs)": "files that the cells of a guide make: tests/test_guides.py",
    r"dvc repro": "of another tool, to compare with",
    r"celestial (data (push|pull|diff)|keep default --package)|dvc (add|import|remote|push)|git (add|checkout|pull)": "tests/test_versions.py",
    r"celestial$|celestial (batch|data|deploy|keep|models (compare|show|rollback)|new|sweep|predict)$": "a command's name",
    r"celestial log feedback": "of an answer that nobody has given here: tests/test_log.py",
    r"celestial label (import (cvat|http)|serve|export (http|labels.zip --format cvat$))": "tests/test_annotations.py",
    r"celestial models (rollback|retire|promote challenger|compare (champion|candidate))": "versions of a history: tests/test_registry.py",
    r"celestial models audit --restart": "gives up a log that is intact here",
}
ANSWERS_NO = {  # pattern → the exit codes that are as right as 0, and why
    r"celestial models promote": ((1,), "the gate refuses what was trained for seconds"),
}
NEEDS_THE_GUIDES_IMAGES = r"celestial (data get guide|(run|params train|serve --model|sweep .*) ?(guide|sim2real))"


def reason(line: str) -> str | None:
    "Why a line is not typed here; None where it is."
    return next((why for pattern, why in NOT_TYPED.items() if re.match(pattern, line)), None)


def typed() -> dict[str, list[str]]:
    "The lines that are typed, by page; each once, where it comes first."
    seen: set[str] = set()
    pages = {}
    for page in PAGES:
        lines = [line for line in dict.fromkeys(lines_of(page)) if line not in seen]
        pages[page.name] = [line for line in lines if not reason(line)]
        seen.update(lines)
    return pages


def test_what_is_not_typed_is_printed_somewhere_and_has_a_reason() -> None:
    printed = [line for page in PAGES for line in lines_of(page)]
    assert [pattern for pattern in NOT_TYPED if not any(re.match(pattern, line) for line in printed)] == []
    assert len([line for lines in typed().values() for line in lines]) > 40
    assert len(typed()["README.md"]) > 15


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A fresh clone, with small params files and what a reader has: photos, a table of labels, a notebook."
    base = tmp_path_factory.mktemp("commands")
    git(base, "clone", "-q", str(snapshot(base / "origin")), str(base / "celestial_ml"))
    folder = base / "celestial_ml"
    (folder / "params/default.yaml").write_text(yaml.safe_dump(SMALL))
    for path in {*(folder / "params").glob("*.yaml")} - {folder / "params/guide-baseline.yaml"}:  # the guide's own
        values = yaml.safe_load(path.read_text())
        for section, small in SMALL.items():
            values.get(section, {}).update({k: v for k, v in small.items() if k in values.get(section, {})})
        path.write_text(yaml.safe_dump(values))
    for name, seed in {"photos": 3, "photographs": 4, "my-photos": 5}.items():
        write_rendered(folder / name, per_class=12, size=48, seed=seed)
    pictures = sorted((folder / "photos").rglob("*.jpg"))
    labels = pd.DataFrame(
        {"file_name": [p.relative_to(folder) for p in pictures], "label": [p.parent.name for p in pictures]}
    )
    labels.to_csv(folder / "labels.csv", index=False)
    for name in ("one.jpg", "picture.jpg"):
        (folder / name).write_bytes(pictures[0].read_bytes())
    cell = nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("a + 1")]), folder / "own.ipynb")
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv/.ready").touch()
    return folder


def environment(clone: Path) -> dict[str, str]:
    "A reader's, with the clone's environment activated."
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_"))}
    path = f"{clone / '.venv/bin'}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(clone), "CELESTIAL_GUIDE_DATA": str(guide_folder() or "")}


def serve(line: str, clone: Path) -> str | None:
    "Start a service on a free port, ask whether it is alive, stop it; what went wrong."
    port = free_port()
    process = subprocess.Popen(
        ["bash", "-c", f"{line} --port {port}"], cwd=clone, env=environment(clone),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    until, alive = time.monotonic() + 120, False
    while not alive and process.poll() is None and time.monotonic() < until:
        try:
            alive = urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except (URLError, OSError):
            time.sleep(0.2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    return None if alive else said[-1000:]


def complaint(line: str, clone: Path) -> str | None:
    "What went wrong when a line was typed; None where it did what it should."
    if re.search(r"celestial serve", line):
        return serve(line, clone)
    if line.startswith("celestial new my-project"):  # a reader starts one
        shutil.rmtree(clone / "my-project", ignore_errors=True)
    done = subprocess.run(
        ["bash", *([] if "| head" in line else ["-o", "pipefail"]), "-c", line], cwd=clone, env=environment(clone), input="a long password\n" * 2,
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    also = next((codes for pattern, (codes, _) in ANSWERS_NO.items() if re.match(pattern, line)), ())
    right = done.returncode in (0, *also) and "Traceback" not in done.stderr
    return None if right else f"exit code {done.returncode}\n{done.stdout[-300:]}{done.stderr[-1000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_a_pages_commands_run_as_printed(page: str, clone: Path) -> None:
    "All of a page, in order; later pages build on earlier ones."
    wrong = {}
    for line in typed()[page]:
        if re.match(NEEDS_THE_GUIDES_IMAGES, line) and guide_folder() is None:
            print(f"left out, without the guide's images: {line}")
            continue
        began = time.monotonic()
        if said := complaint(line, clone):
            wrong[line] = said
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)
    assert not wrong, "\n\n".join(f"$ {line}\n{said}" for line, said in wrong.items())
