"The guides: each teaches one job, runs from top to bottom, shows pictures, and leaves what is yours alone."

import ast
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

GUIDES = sorted((Path(__file__).resolve().parent.parent / "nbs/guides").glob("*.ipynb"))
NEEDS_NO_RUN = ("01_explore_the_images",)


def prose(guide: Path) -> str:
    return "\n\n".join(cell.source for cell in nbformat.read(guide, 4).cells if cell.cell_type == "markdown")


def python(guide: Path) -> ast.Module:
    "The code of a guide, without what is handed to the shell."
    cells = [cell.source for cell in nbformat.read(guide, 4).cells if cell.cell_type == "code"]
    return ast.parse("\n".join(cell for cell in cells if not cell.startswith("%%sh")))


def test_every_job_has_its_guide() -> None:
    assert [guide.stem for guide in GUIDES] == [
        "01_explore_the_images",
        "02_your_first_run",
        "03_change_a_parameter",
        "04_your_own_images",
        "05_read_the_models_mind",
        "06_batch_reruns_and_sweeps",
        "07_champion_and_back",
        "08_a_month_in_minutes",
        "09_live_mistakes",
        "from_your_own_notebook",
    ]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_states_its_duration_and_what_to_read_next(guide: Path) -> None:
    text = prose(guide)
    assert re.match(r"# .+\n\n> .{40,}\n\nTen minutes", text), "a title, what it's about, and how long it takes"
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    missing = [link for link in links if "://" not in link and not (guide.parent / link).exists()]
    assert not missing
    onward = re.findall(r"\]\(([^)]+\.ipynb)\)", text.rpartition("**Next:**")[2])
    assert "**Next:**" in text and onward and guide.name not in onward


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_calls_the_library_and_asserts_what_it_shows(guide: Path) -> None:
    nodes = list(ast.walk(python(guide)))
    assert not [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)], "define it in a room"
    assert any(isinstance(node, ast.ImportFrom) and (node.module or "").startswith("celestial_ml.") for node in nodes)
    assert sum(isinstance(node, ast.Assert) for node in nodes) >= 2


def run(guide: Path, project: Path) -> NotebookNode:
    "Execute a guide in a copy of the project, as `make guides` does."
    notebook = nbformat.read(guide, 4)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_"))}
    tools = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    env = kept | {"PATH": tools, "PYTHONPATH": str(project), "CELESTIAL_TERMINAL": "1"}
    client = NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(project / "nbs/guides")}})
    return client.execute(env=env)


@pytest.mark.parametrize(
    "guide",
    [pytest.param(g, id=g.stem, marks=[] if g.stem in NEEDS_NO_RUN else pytest.mark.slow) for g in GUIDES],
)
def test_a_guide_runs_from_top_to_bottom(guide: Path, project: Path) -> None:
    done = run(guide, project)
    code = [cell for cell in done.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "every cell ran"
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1, "a guide has pictures"
    said = "".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in said
    state = project / ".celestial"
    assert not state.exists() or {path.name for path in state.iterdir()} <= {"guides"}, "a registry of its own"
