"The commands that the pages print: what a reader would type."

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from celestial_ml.core.files import read_json

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
HANDWRITTEN = sorted(NBS.glob("*.md"))


def prose_of(path: Path) -> str:
    "The text of a page, without a notebook's code."
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n".join("".join(c["source"]) for c in read_json(path)["cells"] if c["cell_type"] == "markdown")


def first_code(notebook: Path) -> str:
    "The first code cell of a notebook."
    return next("".join(c["source"]) for c in read_json(notebook)["cells"] if c["cell_type"] == "code")


def code_of(path: Path) -> str:
    "The code on a page, a command a line: blocks, spans in the text, and the cells of a notebook that go to the shell."
    text, cells = path.read_text(), []
    if path.suffix == ".ipynb":
        cells = [("".join(cell["source"]), cell["cell_type"]) for cell in read_json(path)["cells"]]
        text = "\n".join(source for source, kind in cells if kind == "markdown")
    shell = [source for source, kind in cells if kind == "code" and source.startswith("%%sh")]
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL) + re.findall(
        r"^    .*$", text, re.MULTILINE
    )
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return "\n".join([*blocks, *shell, *spans]).replace("\\\n", " ")


PAGES = [ROOT / "README.md", *HANDWRITTEN, *sorted((NBS / "guides").glob("*.ipynb"))]


def commands_of(path: Path, program: str) -> list[list[str]]:
    "The words behind a program's name, each time that a page calls it."
    found = []
    for line in code_of(path).splitlines():
        for part in re.split(r"\s[|<>]+\s|&&|;|2>", line):
            words = shlex.split(part.replace("'", '"') if part.count("'") % 2 else part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words[:1] == [program]:
                found.append(words[1:])
    return found


def command_of(words: Iterable[str]) -> tuple[Any, str, list[str]]:
    "The command that the words behind `celestial` call, its name, and its own words; there has to be one of that name."
    from celestial_ml.cli.app import app

    command, name, rest = typer.main.get_command(app), "celestial", list(words)
    while rest and rest != ["--help"] and isinstance(command, TyperGroup):
        assert rest[0] in command.commands, f"there is no celestial {' '.join(words)}"
        command, name = command.commands[rest[0]], rest.pop(0)
    return command, name, rest


PROGRAMS = (
    "celestial",
    "docker",
    "dvc",
    "git",
    "make",
    "nbdev_update",
    "papermill",
    "pip",
    "pytest",
    "python",
    "source",
)


def lines_of(path: Path) -> list[str]:
    "What a page says to type, in its order: whole lines for a shell, pipes and variables included."
    lines = (re.sub(r"\s+#\s.*", "", line).strip() for line in code_of(path).splitlines())
    return [line for line in lines if re.match(rf"([A-Z_]+=\S+ )?({'|'.join(PROGRAMS)})(\s|$)", line)]
