"What ordinary use leaves behind: a clone without changes, and pages that work with the cable out."

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.cli import main as dvc
from nbdev.clean import nbdev_trust
from programs import chromium, git
from projects import ROOT, Celestial

from celestial_ml.flow.pipeline import Plan

READY = ("--set", "data.source=folder", "--set", "data.folder=output/smoke/images")  # nothing is rendered again


@pytest.fixture(scope="module")
def used(smoke: Plan, at_home: Path, celestial_here: Celestial) -> Iterator[Path]:
    "A clone in which a person has tried the commands of the README."
    shutil.copytree(ROOT / "results", at_home / "results")
    git(at_home, "init", "-q")
    git(at_home, "add", "-A")
    git(at_home, "commit", "-q", "-m", "as it was")
    picture = next((at_home / "output/smoke/images").rglob("*.jpg"))
    for arguments in (
        ["run", "smoke"],
        ["data", "check", "--params", "smoke"],
        ["data", "show", "output/smoke/images"],
        ["predict", picture, "--model", "smoke"],
        ["batch", picture.parent, "output/answers", "--model", "smoke"],
        ["sweep", "smoke", "--grid", "seed=1,2", "--until", "acquire", "--run", "seeds", *READY],
        ["report", "smoke", "--output", "output/comparison.html"],
        ["params", "train", "smoke"],
        ["models", "list"],
    ):
        result = celestial_here(*arguments)
        assert result.returncode == 0, (arguments, result.stderr)
    for arguments in (["metrics", "diff"], ["params", "diff"], ["plots", "diff"]):
        assert dvc(arguments) == 0, arguments
    nbdev_trust(at_home / "nbs")
    (at_home / "params/tuned.yaml").touch()  # as `celestial tune` does
    yield at_home


def test_ordinary_use_leaves_a_clean_clone(used: Path) -> None:
    assert git(used, "status", "--short") == ""


def test_no_page_names_what_it_would_load_from_elsewhere(used: Path) -> None:
    pages = sorted((used / "output").rglob("*.html"))
    names = {page.name for page in pages}
    assert {"train.html", "report.html", "model_card.html", "summary.html", "comparison.html", "index.html"} <= names
    for page in pages:
        loads = re.findall(
            r"""<(?:script|img|iframe|source|link)[^>]+(?:src|href)=["']?((?:https?:)?//[^"' >]+)""", page.read_text()
        )
        assert loads == [], page


@pytest.mark.browser
def test_every_page_works_with_the_cable_out(used: Path) -> None:
    "Opened from disk in a browser that reaches nobody: no request elsewhere, and nothing to complain of."
    with chromium() as browser:
        page, wrong = browser.new_page(), []
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or wrong.append(f"asks {r.url}"))
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        for path in sorted((used / "output").rglob("*.html")):
            page.goto(path.as_uri())
            page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
            assert page.locator("body").inner_text().strip() or page.locator("img").count(), path
            assert wrong == [], path
