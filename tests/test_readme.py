"""The newcomer's path: what the README says to type, typed.

`FULL=1` makes the environment as well, instead of using the one that runs the tests.
"""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from programs import chromium, free_port
from projects import snapshot
from typer.testing import CliRunner

from celestial_ml.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
URL = "https://github.com/celestial-ml/celestial_ml"
KINDS = {"circle": "red", "square": "green", "triangle": "blue"}


def commands() -> list[str]:
    "The commands between the two marks in the README."
    block = re.search(r"<!-- newcomer -->\n```sh\n(.+?)```\n<!-- /newcomer -->", (ROOT / "README.md").read_text(), re.S)
    assert block, "the README has lost its path for newcomers"
    return [line for line in block[1].splitlines() if line.strip()]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def test_ten_commands_at_most() -> None:
    assert 5 <= len(commands()) <= 10
    assert commands()[0].startswith(f"git clone {URL}") and not any("&&" in c or ";" in c for c in commands())


def test_each_command_is_there(tmp_path: Path) -> None:
    "Each make target and each command of `celestial` exists, with the options that are named."
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    made = set(
        re.findall(r"^([a-z]+):", (ROOT / "celestial_ml/workbench/template/project/Makefile.jinja").read_text(), re.M)
    )
    for command in commands():
        first, *rest = words(command)
        if first == "make":
            inside = any("my-project" in c and c.startswith("cd") for c in commands()[: commands().index(command)])
            assert rest[0] in (made if inside else targets), command
        elif first == "celestial":
            asked = [word for word in rest if re.fullmatch(r"[a-z]+", word)][: 2 if rest[0] == "data" else 1]
            told = CliRunner().invoke(app, [*asked, "--help"])
            assert told.exit_code == 0, command
            assert all(word in told.output for word in rest if word.startswith("--")), command
        else:
            assert first in ("git", "cd", "source"), command


def test_links_within_the_repository_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(links) > 20 and [link for link in links if not (ROOT / link).exists()] == []


def draw(folder: Path, count: int) -> None:
    "A newcomer's photos: shapes in shades of a colour, of many sizes, JPEG and PNG, one of each class broken."
    chance = random.Random(1)
    for kind, colour in KINDS.items():
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            width, height = chance.randint(60, 220), chance.randint(60, 220)
            picture = Image.new("RGB", (width, height), f"hsl(0, 0%, {chance.randint(80, 98)}%)")
            hue = {"red": 0, "green": 120, "blue": 230}[colour] + chance.randint(-15, 15)
            x, y, r = width / 2, height / 2, chance.uniform(0.25, 0.4) * min(width, height)
            pen, fill = ImageDraw.Draw(picture), f"hsl({hue % 360}, 70%, {chance.randint(35, 60)}%)"
            {
                "circle": lambda: pen.ellipse((x - r, y - r, x + r, y + r), fill=fill),  # noqa: B023
                "square": lambda: pen.rectangle((x - r, y - r, x + r, y + r), fill=fill),  # noqa: B023
                "triangle": lambda: pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill),  # noqa: B023
            }[kind]()
            picture.save(folder / kind / f"{i:03}.{chance.choice(['jpg', 'png'])}")
        (folder / kind / "broken.jpg").write_bytes(b"\xff\xd8 this was a picture once")


@pytest.fixture
def answers_at(tmp_path: Path) -> Iterator[str]:
    "The URL of the demo at the end of the path."
    origin = snapshot(tmp_path / "origin")
    draw(tmp_path / "photos", 40)
    lines = [command.replace(URL, shlex.quote(str(origin))) for command in commands()]
    lines[0] += " celestial_ml"  # the folder that the URL would have given it
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CELESTIAL_", "MLFLOW_", "VIRTUAL_ENV"))}
    if not os.environ.get("FULL"):
        # The clone's environment is the one that runs the tests, and finds the clone's package first.
        lines.insert(
            2, f"mkdir .venv; ln -s {shlex.quote(str(Path(sys.executable).parent))} .venv/bin; touch .venv/.ready"
        )
        env["PYTHONPATH"] = str(tmp_path / "celestial_ml")
    env["PORT"] = str(free_port())
    own = str(Path(sys.executable).parent)
    env["PATH"] = os.pathsep.join(part for part in env["PATH"].split(os.pathsep) if part != own)
    with (tmp_path / "said").open("w") as said:
        script = ["bash", "-e", "-c", "\n".join(lines)]
        process = subprocess.Popen(
            script, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
        )
    try:
        told, url = [], None
        assert process.stdout
        while not url and (line := process.stdout.readline()):
            told.append(line)
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            url = found and found.group()
        assert url, "".join(told) + (tmp_path / "said").read_text()
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
@pytest.mark.browser
def test_from_a_clone_to_an_answer_about_a_picture_of_ones_own(answers_at: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with chromium() as browser:
        page = browser.new_page()
        page.goto(answers_at)
        page.get_by_role("heading", name="What is in this picture?").wait_for()
        assert "circle" in page.locator("#right .plain").inner_text()
        assert page.get_by_role("tab", name="Try to fool it").count() == 0 and "Saturn" not in page.content()
        for kind in KINDS:
            picture = next(path for path in sorted((tmp_path / "photos" / kind).iterdir()) if path.name[0].isdigit())
            page.locator("#drop input[type=file]").set_input_files(picture)
            playwright.expect(page.locator("#right h2")).to_have_text(kind, timeout=30_000)
