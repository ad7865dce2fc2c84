"The documentation: complete where it is written from the code, true where it names files, offline, and readable by all."

import ast
import functools
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import unquote, urldefrag

import pytest
import yaml
from printed import HANDWRITTEN, PAGES, command_of, commands_of, first_code, prose_of
from programs import chromium, violations, web_server
from typer.testing import CliRunner

from celestial_ml.core import many_classes
from celestial_ml.core.files import read_json, write_json
from celestial_ml.core.intervals import share_interval
from celestial_ml.core.params import known_keys, load_params
from celestial_ml.data.corruptions import CORRUPTIONS
from celestial_ml.flow.steps import SECTIONS, load_tasks, step_parameters
from celestial_ml.planets.bodies import BODIES
from celestial_ml.serve.settings import ServeSettings
from celestial_ml.workbench.generated_files import fill_figures

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
# Ten changes that a reader looks for: words of the room's row in the page, the room, and a name in the notebook that
# the page sends the reader to, which is where the change is made.
CHANGES = {
    "limit of 5 MB on uploads": ("serve", "nbs/serve/04_settings.ipynb", "max_bytes"),
    "a new corruption": ("data", "nbs/data/11_corruptions.ipynb", "CORRUPTIONS"),
    "another column in the log": ("monitor", "nbs/monitor/00_tables.ipynb", "Column"),
    "another sink for alerts, such as mail": ("monitor", "nbs/monitor/31_sinks.ipynb", "sink"),
    "a stricter gate": ("registry", "nbs/registry/05_gate.ipynb", "judge"),
    "a new augmentation": ("model", "nbs/model/01_augment.ipynb", "random_fog"),
    "the colour of a chart in the report": ("core", "celestial_ml/core/templates/charts.jinja", "known"),
    "an export to another format": ("model", "nbs/model/07_export.ipynb", "serving_graph"),
    "a new tab of the demo": ("demo", "nbs/demo/07_page.ipynb", "gr.Tab"),
    "another leftover file to skip": ("core", "nbs/core/08_folders.ipynb", "is_leftover"),
}

sys.path.insert(0, str(NBS / "docs-assets"))

import docments  # noqa: E402
import drawings  # noqa: E402
import reference  # noqa: E402


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    "The pages that are written from the code."
    return reference.pages(ROOT)


def section(page: str, anchor: str) -> str:
    "What stands on a page under the heading with this anchor."
    found = re.search(
        rf"^(#+) [^\n]*\{{ #{re.escape(anchor)} \}}\n(.*?)(?=^#{{1,6}} |\Z)", page, re.DOTALL | re.MULTILINE
    )
    assert found, f"there is no heading #{anchor}"
    return found[2]


def test_every_parameter_is_explained(pages: dict[str, str]) -> None:
    page = pages["reference/parameters.md"]
    for key, field in known_keys().items():
        row = re.search(rf'^\| <code id="{re.escape(key)}">.*$', page, re.MULTILINE)
        assert row, f"{key} is missing"
        assert reference.bar(field["description"]) in row[0]
    for step, sections in SECTIONS.items():
        for name in set(sections) - {"seed"}:
            assert f"[{step}](../steps/" in section(page, name), f"{name} doesn't say that {step} uses it"
    for path in (ROOT / "params").glob("*.yaml"):
        assert path.stem == "default" or f"celestial run {path.stem}" in section(page, f"file-{path.stem}")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_placed_by_its_rooms_name(change: str) -> None:
    "The room's row names the change, no other does, and the notebook that is made for it is in that room."
    room, file, symbol = CHANGES[change]
    rows = re.findall(r"^\| `(\w+)` \|(.*)$", (NBS / "find-your-way.md").read_text(), re.MULTILINE)
    assert len(rows) > 10 and all((NBS / name).is_dir() for name, _ in rows)
    assert [name for name, examples in rows if change in examples] == [room]
    assert f"/{room}/" in file and symbol in (ROOT / file).read_text()


def test_every_command_is_explained(pages: dict[str, str]) -> None:
    "All that `--help` shows is on the page: the commands, their options, their sentence and their example."
    from celestial_ml.cli.app import app

    page, seen = pages["reference/cli.md"], 0
    waiting = [[]]
    while waiting:
        words = waiting.pop()
        said = CliRunner().invoke(app, [*words, "--help"], terminal_width=200).output
        commands = re.search(r"^Commands:\n((?:  .*\n|\n)*)", said, re.MULTILINE)
        if commands:
            waiting += [[*words, name] for name in re.findall(r"^  ([a-z][\w-]*)", commands[1], re.MULTILINE)]
            continue
        seen += 1
        there = section(page, "-".join(["celestial", *words]))
        for option in set(
            re.findall(r"(?<![\w-])--[a-z][\w-]*", said.partition("Options:")[2].partition("Example:")[0])
        ):
            assert option == "--help" or option in there, f"{' '.join(words)} has {option}"
        assert "Example: `celestial " in there
    assert seen > 20


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_a_page_prints_commands_that_parse(path: Path) -> None:
    "Each command of a page exists and takes the options and values beside it; a name alone stands for the command."
    for words in commands_of(path, "celestial"):
        command, name, rest = command_of(words)
        if rest and rest != ["--help"]:
            values = command.make_context(name, rest).params  # raises for an unknown option or a value out of range
            settings = [*(values.get("set_") or ()), *(one.split(",")[0] for one in values.get("grid") or ())]
            load_params("default", [] if values.get("notebook") else settings, ROOT / "params")
            files = values.get("params") or []
            names = {files} if isinstance(files, str) else {*files}
            names = {name for name in names if Path(name).suffix != ".yaml" and name != "NAME"}
            assert names <= {"tuned", *(file.stem for file in (ROOT / "params").glob("*.yaml"))}, words


def test_the_commands_of_the_pages_are_read() -> None:
    counts = {path.name: len(commands_of(path, "celestial")) for path in PAGES}
    assert counts["README.md"] > 20 and counts["operations.md"] > 12 and counts["06_batch_reruns_and_sweeps.ipynb"] > 4
    assert ["sweep", "smoke", "--grid", "train.lr=0.001,0.003", "--grid", "model.width=8,16"] in commands_of(
        ROOT / "README.md", "celestial"
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_a_page_names_targets_variables_and_files_that_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands_of(path, "make"):
        assert {word for word in words if "=" not in word} <= targets, words
    source = "".join(file.read_text() for file in (ROOT / "celestial_ml").rglob("*.py"))
    for name in re.findall(r"CELESTIAL_[A-Z_]*[A-Z]", text := path.read_text()):
        setting = name.removeprefix("CELESTIAL_SERVE_")
        assert setting == "CELESTIAL_SERVE" or setting.lower() in ServeSettings.model_fields or name in source, name
    for file in re.findall(r"`((?:nbs|tests|params|bench|celestial_ml|\.github)/[\w./-]+)`", text):
        assert "NN_" in file or (ROOT / file).exists(), file
    for words in commands_of(path, "papermill"):
        assert words[0] == "…" or (ROOT / words[0]).is_file(), words


def test_figures_are_those_of_the_committed_results() -> None:
    "What is marked is written from results/; what is said of all is true of all; the rest names what measures it."
    index = (NBS / "index.ipynb").read_text()
    cells = ["".join(cell["source"]) for cell in read_json(NBS / "index.ipynb")["cells"]]
    assert [fill_figures(cell, ROOT / "results") for cell in cells] == cells, "run `make export`"
    assert index.count("<!-- / -->") >= 10
    text = (ROOT / "README.md").read_text()
    guide, default = (read_json(ROOT / f"results/{run}/metrics.json")["unknown"] for run in ("guide", "default"))
    for claimed in re.findall(r"all (\d+) unknown", text):
        kinds = guide["kinds"].values()
        assert int(claimed) == sum(kind["images"] for kind in kinds) and all(kind["unknown"] == 1 for kind in kinds)
    if "none of the known bodies" in text:
        assert guide["false_alarm_rate"] == default["false_alarm_rate"] == 0
    table = section_of(text, "How good is it?")
    rows = [re.split(r" \| ", row.strip("| ")) for row in re.findall(r"^\| \S.*\|$", table, re.MULTILINE)][1:]
    assert len(rows) > 15
    for row in rows:
        commands = re.findall(r"`([^`]+)`", row[2])
        assert commands and all(re.match(r"celestial|make|python -m bench", one) for one in commands), row


COUNT = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
LESSON, DEFAULT = load_params("lesson", folder=ROOT / "params"), load_params("default", folder=ROOT / "params")
# What a page says, and what it follows from: page, words with a gap, what belongs into the gap.
STATEMENTS = [
    ("README.md", "renders {:,} images", len(BODIES) * DEFAULT.data.per_class),
    ("README.md", "`make run` executes {} notebooks", COUNT[len(load_tasks(ROOT, "default"))]),
    ("README.md", "`predictions.parquet`, {} plots", COUNT[sum(path.suffix == ".png" for path in load_tasks(ROOT, "default")["evaluate"].product.values())]),
    ("README.md", "{} [guides]", COUNT[len(list((NBS / "guides").glob("[0-9]*.ipynb")))].capitalize()),
    ("README.md", "our renderer draws {} bodies", COUNT[len(BODIES)]),
    ("README.md", "| {} corruptions in 5 severities", len(CORRUPTIONS)),
    ("README.md", "change `epochs` in its {} code cell", "first" if "epochs = " in first_code(NBS / "steps/04_train.ipynb") else "?"),
    ("README.md", "loads the new champion within {} second", "a" if ServeSettings().reload_seconds == 1 else "?"),
    ("faq.md", "The check requires at least {}", COUNT[DEFAULT.check.min_per_class]),
    ("faq.md", "Beyond {} classes", many_classes.MANY),
    ("faq.md", "tables show the {} worst classes", many_classes.FEW),
    ("faq.md", "at most {} images are explained", int(re.search(r"^EXPLAINED = (\d+)", (ROOT / "celestial_ml/model/explain.py").read_text(), re.MULTILINE)[1])),
    ("faq.md", 'a perfect score only means "probably above {:.2f}"', int(100 * share_interval(30, 30)[0]) / 100),
    ("faq.md", "Python {} or newer", re.search(r'requires-python=">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]),
    ("02_your_first_run.ipynb", "{} pictures of", len(BODIES) * LESSON.data.per_class),
    ("02_your_first_run.ipynb", "of {} pixels", LESSON.data.image_px),
    ("02_your_first_run.ipynb", "{} epochs", COUNT[LESSON.train.epochs]),
    ("02_your_first_run.ipynb", "trains on {:,} pictures", len(BODIES) * DEFAULT.data.per_class),
    ("02_your_first_run.ipynb", "pictures of {} pixels and takes", DEFAULT.data.image_px),
    ("03_change_a_parameter.ipynb", "Two accuracies on {} pictures each", round(len(BODIES) * LESSON.data.per_class * LESSON.data.test)),
    ("05_read_the_models_mind.ipynb", "under *{}*", re.findall(r'gr\.Tab\("([^"]+)"', (ROOT / "celestial_ml/demo/page.py").read_text())[1]),
    ("06_batch_reruns_and_sweeps.ipynb", "Here you start {} at once", "six"),
    ("comparison.md", "this project is on version {}, pinned", re.search(r'"nbdev>=(\d+\.\d+)', (ROOT / "pyproject.toml").read_text())[1]),
]  # fmt: skip


@pytest.mark.parametrize(("page", "words", "value"), STATEMENTS, ids=[f"{p}: {w}" for p, w, _ in STATEMENTS])
def test_a_statement_is_what_the_code_says(page: str, words: str, value: object) -> None:
    path = next(path for path in PAGES if path.name == page)
    assert words.format(value) in " ".join(prose_of(path).split())


def test_operations_name_the_defaults_of_the_settings() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([^|]+) \|", (NBS / "operations.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    for name, printed in rows:
        value = getattr(ServeSettings(), name.lower())
        value = str(value).lower() if isinstance(value, bool | str) else value
        assert printed == (f"{value:.10g}" if isinstance(value, int | float) else value or "none"), name


def test_the_lab_page_names_all_that_smoke_changes() -> None:
    "Else the step in JupyterLab is not the pipeline's, and not fresh."
    small, whole = (
        step_parameters("train", load_params(name, folder=ROOT / "params")) for name in ("smoke", "default")
    )
    sentence = re.search(r"In the parameters cell, write (.*?) Choose", (NBS / "lab.md").read_text(), re.DOTALL)[1]
    told = {name: ast.literal_eval(value) for name, value in re.findall(r"`(\w+) = ([^`]+)`", sentence)}
    assert told == {"run": "smoke"} | {name: value for name, value in small.items() if value != whole[name]}


def section_of(text: str, heading: str) -> str:
    "A section of a page without anchors."
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_a_page_names_sections_of_the_benchmark_that_exist(path: Path) -> None:
    from bench.__main__ import SECTIONS

    for words in commands_of(path, "python"):
        if words[:2] == ["-m", "bench"]:
            assert set(words[2:]) - {word for word in words[2:] if word.startswith("-")} <= {
                *SECTIONS,
                *(params.stem for params in (ROOT / "params").glob("*.yaml")),
                "FOLDER",
            }


def test_each_wish_has_its_command() -> None:
    "All commands and all targets are on the page of wishes."
    page = NBS / "commands.md"
    wishes = [" ".join(words) for words in commands_of(page, "celestial")]
    commands = [name for name, command in reference.commands().items() if not hasattr(command, "commands")]
    assert [name for name in commands if not any(f"celestial {wish} ".startswith(f"{name} ") for wish in wishes)] == []
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"help"}
    assert targets <= {words[0] for words in commands_of(page, "make") if words}


def test_every_route_is_explained(pages: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The routes of the service as it is built, with a request for each, and every error."
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path))
    from celestial_ml.serve.api import build_app

    app = build_app(None)
    try:
        paths = app.openapi()["paths"]
    finally:
        app.state.service.close()
    page = pages["reference/http.md"]
    assert "(../operations.md#the-open-inference-protocol)" in page, "which describes the routes under /v2"
    for path, methods in paths.items():
        for method, about in methods.items() if not path.startswith("/v2") else ():
            there = section(page, f"{method}{path.replace('/', '-')}")
            assert f"127.0.0.1:8000{path}" in there
            codes = re.findall(r"'code': '(\w+)'", str(about["responses"]))
            assert [code for code in codes if f"`{code}`" not in there] == []
    assert "-F image=@saturn.jpg" in section(page, "post-predict")


def test_every_module_is_in_the_library_reference(pages: dict[str, str]) -> None:
    for path in (ROOT / "celestial_ml").rglob("[!_]*.py"):
        module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        assert f"\n::: {module}\n" in pages[f"reference/library/{path.parent.name}.md"], "run `make export`"


def test_docments_become_documentation() -> None:
    "Comments behind parameters, arrows and fields, and the notebook that explains a name."
    import griffe

    loader = griffe.GriffeLoader(search_paths=[str(ROOT)], extensions=griffe.load_extensions(docments.Docments()))
    package = loader.load("celestial_ml")
    said = package["core.errors.nearest"].docstring
    sections = {part.kind.value: part.value for part in said.parse("google")}
    assert {p.name: p.description for p in sections["parameters"]} == {
        "name": "what the person wrote",
        "names": "that exist",
    }
    assert "none is similar" in sections["returns"][0].description
    assert "(../../core/00_errors.ipynb#did-you-mean)" in said.value
    assert package["core.params.Train.lr"].docstring.value == "learning rate of Adam, at its peak"
    assert package["flow.steps.Task.source"].docstring.value == "its notebook"


def targets(path: Path, pages: dict[str, str]) -> list[tuple[str, str]]:
    "Where the links of a handwritten page lead within the site: file and anchor."
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    return [(file or path.name, anchor) for file, anchor in map(urldefrag, links) if not re.match(r"[a-z]+:", file)]


@pytest.mark.parametrize("path", HANDWRITTEN, ids=lambda p: p.name)
def test_handwritten_page_links_to_what_is_there(path: Path, pages: dict[str, str]) -> None:
    for file, anchor in targets(path, pages):
        text = pages.get(file) or ((NBS / file).read_text(errors="replace") if (NBS / file).is_file() else None)
        assert text is not None, f"{path.name} links to {file}"
        if anchor and file.startswith("reference/") and "library/" not in file:
            assert f'id="{anchor}"' in text or f"{{ #{anchor} }}" in text, f"{path.name} links to {file}#{anchor}"


def test_find_your_way_names_what_is_there(pages: dict[str, str]) -> None:
    "Every file and every command that the page names."
    text = (NBS / "find-your-way.md").read_text()
    named = set(re.findall(r"`((?:nbs|tests|params|celestial_ml)/[\w./-]+|[\w-]+\.(?:yaml|yml|toml))`", text))
    assert len(named) > 40 and [name for name in named if not (ROOT / name).exists()] == []
    for command in re.findall(r"`celestial ([a-z ]+)", text):
        assert f"{{ #celestial-{command.strip().replace(' ', '-')} }}" in pages["reference/cli.md"]
    written = reference.rooms_list(ROOT) + reference.tests_list(ROOT)
    for path in [*NBS.glob("*/[0-9]*.ipynb"), *(ROOT / "tests").glob("test_*.py")]:
        if path.parent.name in reference.ROOMS or path.parent.name == "tests":
            assert path.name in written
    assert re.findall(r"\| *\|$", written, re.MULTILINE) == [], "a notebook or a test file says nothing of itself"


@functools.cache
def the_hook() -> ModuleType:
    "What mkdocs.yml hooks in."
    spec = importlib.util.spec_from_file_location("site_hook", NBS / "docs-assets/site.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


def test_a_notebook_is_shown_as_its_run_has_left_it(tmp_path: Path) -> None:
    "With the outputs of a run of these very cells; bare where the cells have changed since, or where the run failed."
    hook = the_hook()
    page, done = tmp_path / "nbs/steps/04_train.ipynb", tmp_path / "output/default/train.ipynb"

    def cell(source: str, *outputs: dict, tags: tuple[str, ...] = ()) -> dict:
        return {"cell_type": "code", "source": source, "metadata": {"tags": list(tags)}, "outputs": list(outputs)}

    said = {"output_type": "stream", "name": "stdout", "text": "accuracy 1.0\n"}
    progress = [{"output_type": "stream", "name": "stderr", "text": f"\r{share} %"} for share in (0, 50, 100)]
    write_json(page, {"cells": [cell("epochs = 1"), cell("print('…')")]})
    assert hook._executed(tmp_path, Path("steps/04_train.ipynb")) is None
    injected = cell("epochs = 5", tags=("injected-parameters",))
    write_json(done, {"cells": [cell("epochs = 1"), injected, cell("print('…')", *progress, said)]})
    shown = read_json(hook._executed(tmp_path, Path("steps/04_train.ipynb")))
    assert [c["source"] for c in shown["cells"]] == ["epochs = 1", "print('…')"]
    assert shown["cells"][1]["outputs"] == [progress[0] | {"text": "100 %"}, said]
    write_json(page, {"cells": [cell("epochs = 2"), cell("print('…')")]})
    assert hook._executed(tmp_path, Path("steps/04_train.ipynb")) is None
    write_json(page, {"cells": [cell("epochs = 1"), cell("print('…')")]})
    write_json(done, {"cells": [cell("epochs = 1"), cell("print('…')", {"output_type": "error", "ename": "E"})]})
    assert hook._executed(tmp_path, Path("steps/04_train.ipynb")) is None


def test_links_of_a_run_to_its_own_folder_are_plain_text_on_the_site() -> None:
    hook = the_hook()
    config = SimpleNamespace(docs_dir=str(NBS))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="steps/08_register.ipynb"))
    html = '<a href="report.html">the report</a> <a href="07_package.ipynb#x">package</a> <a href="https://a.org">a</a>'
    assert hook._without_own_files(html, page, config) == html.replace(
        '<a href="report.html">the report</a>', "the report"
    )


def test_glossary_is_in_order() -> None:
    words = re.findall(r"^\*\*(.+)\*\*$", (NBS / "glossary.md").read_text(), re.MULTILINE)
    assert len(words) > 40 and words == sorted(words, key=str.casefold) and len(words) == len(set(words))


def test_drawings_show_what_the_code_says() -> None:
    tasks = load_tasks(ROOT, "default")
    drawn = drawings.pipeline_drawing(ROOT)
    assert drawn.count("marker-end") == sum(len(task.upstream) for task in tasks.values())
    assert all(f">{name}</text>" in drawn for name in tasks) and "model.onnx" in drawn
    pairs = drawings.room_imports(ROOT)
    assert drawings.rooms_drawing(ROOT).count("marker-end") == len(pairs)
    floors = reference.ROOMS
    assert all(floors.index(lower) < floors.index(upper) for upper, lower in pairs)
    assert {("serve", "model"), ("serve", "registry")}.isdisjoint(pairs), "nbs/architecture.md says so"
    path = drawings.serving(ROOT)
    assert {"celestial_ml.serve.guard", "celestial_ml.serve.predictor"} <= path.keys()
    assert {name.split(".")[1] for name in path} == {"core", "data", "package", "serve"}
    needed = set(drawings.needed(ROOT))
    assert {"onnxruntime", "fastapi"} <= needed and needed.isdisjoint({"tensorflow", "keras", "mlflow", "ploomber"})


def test_pages_workflow_is_pinned_and_may_do_little() -> None:
    text = (ROOT / ".github/workflows/pages.yml").read_text()
    spec = yaml.safe_load(text)
    assert all(re.search(r"@[0-9a-f]{40} # v", line) for line in text.splitlines() if "uses:" in line)
    assert spec["permissions"] == {"contents": "read"} and spec["concurrency"]["group"] == "pages"
    assert spec[True]["push"] == {"branches": ["main"]} and "pull_request" not in spec[True]
    assert "permissions" not in spec["jobs"]["build"]
    assert spec["jobs"]["deploy"]["permissions"] == {"pages": "write", "id-token": "write"}


# ---------------------------------------------------------------- the built site
@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The site, built without a warning and without a network."
    folder = tmp_path_factory.mktemp("docs") / "site"
    offline = ["unshare", "--map-root-user", "--net"]
    allowed = shutil.which("unshare") and subprocess.run([*offline, "true"], capture_output=True).returncode == 0
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*(offline if allowed else []), *command],
        cwd=ROOT,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"WARNING|ERROR", done.stderr), done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"built in {seconds:.0f} s of one core, {'without a network' if allowed else 'with the network misdirected'}")
    assert seconds < 60
    return folder


class Page(HTMLParser):
    "The anchors, the links and the files of a page."

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.loads = {""}, set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        self.anchors |= {said.get("id") or "", said.get("name") or ""}
        if tag == "a" and said.get("href"):
            self.links.add(said["href"])
        elif tag in ("img", "script", "iframe", "link", "source") and (url := said.get("src") or said.get("href")):
            self.loads.add(url)


@pytest.mark.slow
def test_links_and_anchors(site: Path) -> None:
    "Every link within the site leads to a page and a place that are there; nothing is loaded from elsewhere."
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 100
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are those of wherever it is shown
        wrong += [f"{path}: loads {url}" for url in page.loads if re.match(r"(https?:)?//", url)]
        for link in page.links | page.loads:
            if re.match(r"[a-z]+:", link):
                continue
            file, anchor = urldefrag(unquote(unescape(link)))
            target = (path.parent / file).resolve() if file else path
            if not target.is_file():
                wrong.append(f"{path.relative_to(site)}: {link}")
            elif target in pages and anchor not in pages[target].anchors and not anchor.startswith("__"):
                wrong.append(f"{path.relative_to(site)}: {link}: there is no such place")
    assert wrong == []


@pytest.mark.slow
def test_home_is_first_and_what_ran_shows_its_outputs(site: Path) -> None:
    "A guide or step that no run of its cells has outputs for says how to get them."
    tabs = re.findall(r'class="md-tabs__link">\s*(.+?)\s*</a>', (site / "index.html").read_text(), re.DOTALL)
    assert tabs[:3] == ["Home", "Find your way", "Guides"]
    for page in [*site.glob("guides/*.html"), *site.glob("steps/*.html")]:
        html = page.read_text()
        assert ("jp-OutputArea-output" in html) != ("Shown without outputs" in html), page.name


@pytest.mark.slow
def test_every_public_name_is_in_the_library_reference(site: Path) -> None:
    count = 0
    for path in (ROOT / "celestial_ml").rglob("[!_]*.py"):
        module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        html = (site / f"reference/library/{path.parent.name}.html").read_text()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                names = ast.literal_eval(node.value)
                missing = [name for name in names if f'id="{module}.{name}"' not in html]
                assert missing == [], module
                count += len(names)
    assert count > 500


VIEWS = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
LOOKED_AT = [
    "index.html",
    "commands.html",
    "find-your-way.html",
    "architecture.html",
    "glossary.html",
    "steps/04_train.html",
    "core/04_params.html",
    "reference/parameters.html",
    "reference/cli.html",
    "reference/http.html",
    "reference/library/core.html",
    "guides/01_explore_the_images.html",
]


@pytest.fixture(scope="module")
def served(site: Path):
    "The site as a web server shows it."
    with web_server(site) as url:
        yield f"{url}/"


@pytest.mark.slow
def test_linkchecker_reports_nothing(served: str) -> None:
    command = [Path(sys.executable).parent / "linkchecker", "--no-status", "--no-warnings"]
    done = subprocess.run([*command, f"{served}index.html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"That's it. (\d+) links", done.stdout)[1]) > 300


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_look(served: str, view: str, scheme: str) -> None:
    "Nothing sticks out, nothing is asked of others, the console is silent, and axe-core finds nothing."
    with chromium() as browser:
        page = browser.new_context(viewport=VIEWS[view], color_scheme=scheme, reduced_motion="reduce").new_page()
        complaints: list[str] = []
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status} {r.url}"))
        page.on("request", lambda r: r.url.startswith((served, "data:", "blob:")) or complaints.append(f"asks {r.url}"))
        for name in LOOKED_AT:
            page.goto(served + name)
            page.locator(".md-content h1").first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") == 0, name
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 384) == (scheme == "dark")
            assert violations(page) == [], name
        if view == "desk":
            search(page)
        assert complaints == []


def search(page) -> None:
    "The search finds, from an index that is here too."
    page.locator("input.md-search__input").press_sequentially("calibration", delay=50)
    page.locator(".md-search-result__item").first.wait_for(timeout=120_000)


@pytest.mark.slow
@pytest.mark.browser
def test_search_works_from_disk(site: Path) -> None:
    with chromium() as browser:
        page, asked = browser.new_page(viewport=VIEWS["desk"]), []
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or asked.append(r.url))
        page.goto((site / "index.html").as_uri())
        search(page)
        assert asked == []
