"What commands print in terminals of several widths and without one: tables, help, checks, progress."

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from celestial_ml.cli.app import app
from celestial_ml.core.files import write_json
from celestial_ml.core.testing import TemporaryHome
from celestial_ml.monitor.log import open_log
from celestial_ml.package.published import published
from celestial_ml.planets.renderer import render
from celestial_ml.registry.audit import append

LONG = "celestial-of-a-long-name/12"
RULE = {"name": "worst slice", "value": 0.86, "passed": True, "why": "worst slice (phase 90–180°) 0.86 reaches 0.6"}
TABLES = [
    ("models", "list"),
    ("models", "show", "champion"),
    ("models", "compare", "celestial/1", "champion"),
    ("models", "audit"),
    ("log", "status"),
    ("log", "show"),
    ("data", "check", "images"),
]
Output = Callable[..., str]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    "A folder with images, and a state folder with two versions, of which one has a long name, and some answers."
    folder = tmp_path_factory.mktemp("terminal")
    for body in ("Mars", "Moon"):
        (folder / "images" / body).mkdir(parents=True)
        for i in range(12):
            picture = Image.fromarray(render(body, size=32, seed=i)).resize((32 + i, 32))
            picture.save(folder / "images" / body / f"{i}.png")
    with TemporaryHome():
        for model in ("celestial/1", LONG):
            name, _, number = model.partition("/")
            metrics = {"accuracy": 0.95, "macro": {"f1": 0.94}, "images": 300}
            metrics["intervals"] = {"accuracy": {"value": 0.95, "low": 0.92, "high": 0.97}}
            about = {"name": name, "version": number, "classes": ["Mars", "Moon"], "sha256": 64 * "0"}
            write_json(published(model) / "model.json", about | {"metrics": metrics, "ood_threshold": 1.0})
            write_json(published(model) / "gate.json", {"rules": [RULE], "reasons": ["it passes"]})
        append("promote", LONG, "champion", {"why": 12 * "a long reason "}, "Ada, Countess of Lovelace")
        log = open_log()
        answer = {"role": "challenger", "model_version": LONG, "sha256": 64 * "a", "known": False}
        for i in range(3):
            own = {"request_id": f"{i:032x}", "time": time.time() - i, "latency_ms": 2.5, "confidence": 0.4}
            log.record(answer | own | {"label": "a class of a long name"})
        log.close()
        yield folder


@pytest.fixture
def output(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    "What a command prints in a terminal so many columns wide, or without a terminal."

    def run(*arguments: str, columns: int | None = None) -> str:
        if columns is None:
            monkeypatch.delenv("COLUMNS", raising=False)
        else:
            monkeypatch.setenv("COLUMNS", str(columns))
        words = [str(filled / word) if word == "images" else word for word in arguments]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        return result.stdout

    return run


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("command", TABLES, ids=" ".join)
def test_a_table_fits_the_terminal_and_loses_nothing(output: Output, command: tuple[str, ...], columns: int) -> None:
    whole, fitted = output(*command), output(*command, columns=columns)
    lines = [line for line in fitted.splitlines() if re.search(r"\S {2,}\S|^ ", line) and not line.startswith("next:")]
    assert lines and max(map(len, lines)) <= columns
    letters = {name: re.sub(r"\s", "", text) for name, text in {"whole": whole, "fitted": fitted}.items()}
    assert not set(re.findall(r"[\w/.-]+", whole)) - set(re.findall(r"[\w/.-]+", fitted)) or columns < 80
    assert len(letters["fitted"]) >= len(letters["whole"]), "a list of names and values repeats the names"


def test_without_a_terminal_a_row_is_a_line_with_gaps(output: Output) -> None:
    head, first, second = (re.split(r" {2,}", line) for line in output("models", "list").splitlines()[:3])
    assert head[:3] == ["version", "alias", "accuracy"] and first[0] == "celestial/1"
    assert second[:3] == [LONG, "champion", "0.9500 (0.9200 to 0.9700)"] and len(second) == len(head)
    head, first = (re.split(r" {2,}", line) for line in output("log", "show").splitlines()[:2])
    assert head == ["time", "request", "role", "model", "answer", "ms", "feedback"]
    assert first[1:] == [32 * "0", "challenger", LONG, "unknown (a class of a long name)", "2.5"]


def test_a_check_ends_with_a_verdict_and_a_next_step(output: Output, filled: Path) -> None:
    lines = output("data", "check", "images").splitlines()
    assert lines[0] == "24 images in 2 classes" and lines[-1].startswith("next:  celestial new ")
    rows = [line for line in lines[1:-2] if line and not line.startswith("look:")]
    assert {line[0] for line in rows} <= {"✓", "!"} and "_" not in "".join(rows).replace(str(filled), "")


@pytest.mark.parametrize("group", [(), ("data",), ("log",), ("keys",), ("models",)], ids=" ".join)
def test_the_list_of_commands_shows_whole_sentences(output: Output, group: tuple[str, ...]) -> None:
    text = output(*group, "--help", columns=80).split("Commands:")[1]
    assert "..." not in text and max(map(len, text.splitlines())) <= 80
    assert re.findall(r"^  \w.*[^.\n](?=\n  \w)", text, re.MULTILINE) == [], "each ends with its full stop"


def test_no_bar_is_drawn_into_a_file() -> None:
    code = """
import time
from celestial_ml.core import progress
progress.MINUTE = 0.3
for i in progress.progress(range(50), "rendering"): time.sleep(0.02)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and "\r" not in done.stderr and "\033" not in done.stderr
    assert 2 <= len(done.stderr.splitlines()) < 25 and "rendering" in done.stderr
