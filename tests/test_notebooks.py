"Contracts of the notebooks: committed clean, exported as they are, and each of its kind."

import ast
import graphlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from celestial_ml.core.params import Params, default_yaml, load_params
from celestial_ml.flow.freshness import imported_modules
from celestial_ml.flow.steps import SECTIONS, load_tasks, step_parameters
from celestial_ml.workbench.generated_files import readme

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
STEPS = [p for p in NOTEBOOKS if p.parent.name == "steps"]
LIBRARY = [p for p in NOTEBOOKS if p.parent.name not in ("steps", "guides", "nbs")]
FLOORS = (  # from the ground up
    *("core", "data", "planets", "model", "package", "registry", "serve", "batch", "demo"),
    *("monitor", "label", "flow", "reports", "workbench", "cli"),
)
OUTSIDE_PARAMETERS = {"upstream", "product", "resources_", "run"}


def cells(notebook: Path, kind: str = "code") -> list[dict]:
    "The cells of one kind."
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def name(notebook: Path) -> str:
    return notebook.relative_to(ROOT / "nbs").as_posix()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebook_is_clean(notebook: Path) -> None:
    content = json.loads(notebook.read_text())
    assert set(content["metadata"]) <= {"kernelspec", "language_info"}
    for cell in content["cells"]:
        assert source(cell).strip(), "an empty cell"
        assert not re.match(r"`?(<{7}|={7}|>{7})", source(cell)), "half of a merge"
        assert set(cell["metadata"]) <= {"tags"}, "run `nbdev_clean`"
        assert "injected-parameters" not in cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "run `nbdev_clean`, commit no outputs"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebook_has_a_title_and_a_subtitle(notebook: Path) -> None:
    first = source(cells(notebook, "markdown")[0])
    assert re.match(r"# .+\n\n> .+", first), "a notebook begins with `# title` and `> subtitle`"


def test_exports_are_fresh(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy2(ROOT / "settings.ini", tmp_path)
    (tmp_path / "celestial_ml").mkdir()
    shutil.copy2(ROOT / "celestial_ml/__init__.py", tmp_path / "celestial_ml")
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True, capture_output=True)
    fresh = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "celestial_ml").rglob("*.py")}
    committed = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "celestial_ml").rglob("*.py")}
    assert fresh.keys() == committed.keys()
    stale = [str(path) for path in fresh if fresh[path] != committed[path]]
    assert not stale, "run `make export` and commit what it changes"


def test_every_module_is_a_notebook() -> None:
    exported = {
        f"{m[1].replace('.', '/')}.py" for nb in LIBRARY if (m := re.search(r"default_exp ([\w.]+)", nb.read_text()))
    }
    modules = {p.relative_to(ROOT / "celestial_ml").as_posix() for p in (ROOT / "celestial_ml").rglob("*.py")}
    assert {m for m in modules if not m.rpartition("/")[2].startswith("_")} == exported


@pytest.mark.parametrize("notebook", LIBRARY, ids=name)
def test_library_notebook_asserts_what_it_shows(notebook: Path) -> None:
    shown = [source(cell) for cell in cells(notebook) if "#| export" not in source(cell)]
    assert any("assert" in code for code in shown)
    assert notebook.parent.name in FLOORS and f"default_exp {notebook.parent.name}." in notebook.read_text()


@pytest.mark.parametrize("notebook", LIBRARY, ids=name)
def test_exported_cells_are_small(notebook: Path) -> None:
    lengths = [len(source(cell).splitlines()) for cell in cells(notebook) if source(cell).startswith("#| export")]
    assert max(lengths) <= 51, "an exported cell has at most 50 lines"


def test_exported_cells_are_short() -> None:
    exported = [source(cell) for nb in LIBRARY for cell in cells(nb) if source(cell).startswith("#| export")]
    assert statistics.median(sum(bool(line.strip()) for line in code.splitlines()[1:]) for code in exported) <= 20


def defined(code: str) -> list[str]:
    "The public names that a cell defines."
    names: list[str] = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def mentioned(code: str) -> set[str]:
    "The names in a cell, bare or behind a dot; magics aren't Python."
    python = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
    tree = compile(python, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(tree) if isinstance(n, ast.Name | ast.Attribute)
    }


@pytest.mark.parametrize("notebook", LIBRARY, ids=name)
def test_every_public_symbol_is_shown_and_asserted(notebook: Path) -> None:
    "What a module offers to others is used in a cell that asserts; what it keeps to itself is exported by `exporti`."
    codes = [source(cell) for cell in cells(notebook)]
    public = [name for code in codes if code.startswith("#| export\n") for name in defined(code)]
    shown = [mentioned(code) for code in codes if not code.startswith("#|") and re.search(r"\bassert|\braises\(", code)]
    assert not [name for name in public if not any(name in names for names in shown)]


def test_rooms_import_only_from_below() -> None:
    "A room imports from rooms below it; within a room there are no circles. Numbers are reading order, nothing more."
    package = ROOT / "celestial_ml"
    modules = {path: path.parent.name for nb in LIBRARY if (path := module_of(nb)).is_file()}
    imports = {m: imported_modules(m.read_text(), package, m.parent) & modules.keys() - {m} for m in modules}
    upward = [
        f"{m.relative_to(package)} imports {other.relative_to(package)}"
        for m, others in imports.items()
        for other in others
        if modules[m] != modules[other] and FLOORS.index(modules[m]) <= FLOORS.index(modules[other])
    ]
    assert not upward
    for room in FLOORS:
        inside = {m: {o for o in others if modules[o] == room} for m, others in imports.items() if modules[m] == room}
        graphlib.TopologicalSorter(inside).prepare()  # raises CycleError, with the circle


def test_one_module_imports_ploomber() -> None:
    "It is no longer developed: a move to another engine must concern one module."
    importers = set()
    for path in (ROOT / "celestial_ml").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] in ("ploomber", "ploomber_engine") for name in names):
                importers.add(path.relative_to(ROOT / "celestial_ml").as_posix())
    assert importers == {"flow/dag.py"}


def module_of(notebook: Path) -> Path:
    "The module that a library notebook becomes."
    name = re.search(r"default_exp ([\w.]+)", notebook.read_text())
    assert name
    return ROOT / "celestial_ml" / f"{name[1].replace('.', '/')}.py"


@pytest.mark.parametrize("notebook", STEPS, ids=name)
def test_step_defines_nothing_and_has_one_parameters_cell(notebook: Path) -> None:
    tagged = [cell for cell in cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    tree = ast.parse("\n".join(source(cell) for cell in cells(notebook)))
    defined = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not defined, "a step calls the library; define it there"
    assert (
        any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(tree))
        or "require_pass" in notebook.read_text()
    )


@pytest.mark.parametrize("notebook", STEPS, ids=name)
def test_parameters_cell_holds_the_defaults(notebook: Path) -> None:
    "The literals of a step's parameters cell are the schema's defaults, under the same names."
    cell = next(cell for cell in cells(notebook) if "parameters" in cell["metadata"].get("tags", []))
    assignments = [node for node in ast.parse(source(cell)).body if isinstance(node, ast.Assign)]
    one_line = [node.lineno == node.end_lineno for node in assignments if isinstance(node.value, ast.Constant)]
    assert all(one_line), "a person changes a line"
    found = {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}
    expected = step_parameters(re.sub(r"^\d+_", "", notebook.stem), Params())
    assert {key: value for key, value in found.items() if key not in OUTSIDE_PARAMETERS} == expected
    assert found.keys() >= OUTSIDE_PARAMETERS and found["run"] == "default"


def test_pipeline_names_every_step() -> None:
    tasks = load_tasks(ROOT, "default")
    chain, beside = ([nb for nb in STEPS if nb.stem[0].isdigit() is numbered] for numbered in (True, False))
    assert [task.source.as_posix() for task in tasks.values()] == [f"nbs/{name(nb)}" for nb in chain]
    assert list(tasks) == ["acquire", "check", "prepare", "train", "evaluate", "explain", "package", "register"]
    assert [*tasks, *(nb.stem for nb in beside)] == list(SECTIONS), "a step beside the chain has no number"
    for nb in beside:
        assert load_tasks(ROOT, "default", nb.stem)[nb.stem].source.as_posix() == f"nbs/{name(nb)}"
    seen: set[str] = set()
    for task in tasks.values():
        assert set(task.upstream) <= seen, "tasks stand in an order of execution"
        seen.add(task.name)
        assert {"notebook", "html"} <= task.product.keys()


def test_readme_and_default_params_are_fresh() -> None:
    assert (ROOT / "README.md").read_text() == readme(ROOT / "nbs/index.ipynb"), "run `make export`"
    assert (ROOT / "params/default.yaml").read_text() == default_yaml(), "run `make export`"


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_params_file_is_valid_and_small(path: Path) -> None:
    load_params(path.stem, folder=ROOT / "params")
    if path.stem != "default":
        assert len(path.read_text().splitlines()) <= 15, "an overlay says only what differs"
        assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_every_sheet_that_dvc_compares_is_kept_by_git() -> None:
    "What dvc.yaml names must not be ignored by git, or two revisions have nothing to compare."
    spec = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for path in [*spec["metrics"], *spec["plots"], "results/default/history.csv"]:
        ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode
        assert ignored != 0 and (ROOT / path).is_file(), f"{path} is ignored by git, or missing"
    assert subprocess.run(["git", "check-ignore", "-q", "output/default/metrics.json"], cwd=ROOT).returncode == 0
