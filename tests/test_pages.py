"Every page that we write, at a desk and on a phone, by day and by night: no complaint, no request elsewhere, no finding of axe-core."

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from programs import chromium, violations
from serving import encoded, tiny_model
from typer.testing import CliRunner

from celestial_ml.cli.app import app
from celestial_ml.flow.pipeline import Plan
from celestial_ml.flow.sweep import Outcome
from celestial_ml.planets.renderer import render
from celestial_ml.reports.sweep_page import write_gallery

pytestmark = pytest.mark.browser
LOOKS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
STEPS = ("acquire", "check", "prepare", "train", "evaluate", "explain", "package", "register")


@pytest.fixture(scope="module")
def pages(smoke: Plan, at_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    "A page of each kind, by its name."
    run = at_home / "output/smoke"
    found = {name: run / f"{name}.html" for name in ("report", "model_card", "data_card", *STEPS)}
    outcomes = [Outcome(f"grid/{name}", {"train.lr": 0.1**i}, "done", 2.0, 1) for i, name in enumerate(("a", "b", "c"))]
    for outcome in outcomes[:2]:
        shutil.copytree(run, at_home / "output" / outcome.run)
    outcomes[2] = Outcome("grid/c", {"train.lr": 9.0}, "failed", 1.0, 1, "train, cell 3: ValueError: too fast")
    found["gallery"] = write_gallery("grid", outcomes).resolve()
    night, model = tmp_path_factory.mktemp("night"), tiny_model(tmp_path_factory.mktemp("model"))
    for i in range(6):
        (night / f"{i}.png").write_bytes(encoded(render("Mars" if i % 2 else "Neptune")[i:]))
    (night / "black.png").write_bytes(encoded(Image.new("RGB", (64, 64))))
    (night / "bad.png").write_text("not a picture")
    done = CliRunner().invoke(app, ["batch", str(night), str(night.parent / "scores"), "--model", str(model), "--json"])
    return found | {"batch": Path(json.loads(done.stdout)["summary"])}


@pytest.fixture(scope="module")
def windows() -> Iterator[dict[tuple[int, str], Any]]:
    "A window of each size and colour."
    with chromium() as browser:
        yield {
            (width, scheme): browser.new_page(
                viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
            )
            for width, scheme in LOOKS
        }


@pytest.mark.parametrize("name", ["report", "model_card", "data_card", "gallery", "batch", *STEPS])
def test_look(pages: dict[str, Path], windows: dict[tuple[int, str], Any], name: str) -> None:
    for look, window in windows.items():
        if name in STEPS and look not in (LOOKS[0], LOOKS[3]):
            continue  # they share one template
        complaints: list[str] = []
        heard = {
            "console": lambda m, to=complaints: m.type in ("error", "warning") and to.append(m.text),
            "pageerror": lambda e, to=complaints: to.append(str(e)),
            "requestfailed": lambda r, to=complaints: to.append(f"failed: {r.url}"),
            "request": lambda r, to=complaints: r.url.startswith(("file:", "data:", "blob:")) or to.append(r.url),
        }
        for event, listener in heard.items():
            window.on(event, listener)
        window.goto(pages[name].as_uri())
        wider = window.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert (violations(window), wider) == ([], 0), look
        for event, listener in heard.items():
            window.remove_listener(event, listener)
        assert complaints == [], look


@pytest.mark.parametrize("name", ["report", "model_card", "data_card", "gallery"])
def test_no_page_for_others_names_a_folder_of_this_machine(pages: dict[str, Path], at_home: Path, name: str) -> None:
    text = pages[name].read_text()
    assert str(at_home) not in text and str(Path.home()) + "/" not in text
