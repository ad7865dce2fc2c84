"""The example domain is a plug-in: nothing else imports it, and without it everything else works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import tiny_model

from celestial_ml.core.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]


def test_nothing_but_planets_imports_planets() -> None:
    modules = [path for path in (ROOT / "celestial_ml").glob("*/*.py") if path.parent.name != "planets"]
    modules.remove(ROOT / "celestial_ml/cli/app.py")  # the command `data render`
    steps = list((ROOT / "nbs/steps").glob("*.ipynb"))
    code = {path: path.read_text() for path in [*modules, *steps]}
    assert len(code) > 90
    assert not {path for path, text in code.items() if re.search(r"\b(from|import) [\w.]*\bplanets\b", text)}


WITHOUT = {
    "domains": """
        from celestial_ml.core.domains import Domain, domain_of, domains
        assert domains() == () and type(domain_of(["Mars"])) is Domain
    """,
    "sources": """
        from celestial_ml.core.errors import CelestialError
        from celestial_ml.data.sources import get_source
        assert get_source("folder")
        try:
            get_source("render")
            raise AssertionError("it is there")
        except CelestialError:
            pass
    """,
    "evaluation": """
        import numpy as np
        from celestial_ml.data.ood_images import ood_kinds
        from celestial_ml.model.behaviour import behaviour_report
        images, labels = [np.full((16, 16, 3), 40 * i, np.uint8) for i in range(4)], np.array([0, 1, 0, 1])
        report = behaviour_report(images, labels, ["cat", "dog"], lambda x: np.tile([0.6, 0.4], (len(x), 1)), 0)
        assert report["minimum_functionality"]["exemplar"]["passed"] is None
        assert all(draw(2, 16, 0).shape == (2, 16, 16, 3) for draw in ood_kinds(["cat", "dog"]).values())
    """,
    "pipeline": """
        import celestial_ml.cli.app, celestial_ml.flow.pipeline
    """,
    "demo": """
        from pathlib import Path
        from fastapi.testclient import TestClient
        from celestial_ml.demo.routes import add_demo
        from celestial_ml.serve.api import build_app
        app = build_app(Path("model"), add_demo)
        with TestClient(app) as client:
            page, config = client.get("/"), client.get("/config").json()
        assert page.status_code == 200 and "What is in this picture?" in page.text
        labels = [part["props"].get("label") for part in config["components"] if part["type"] == "tabitem"]
        assert labels == ["Identify", "Compare", "Performance", "Many at once"], labels
    """,
}


@pytest.fixture(scope="module")
def without_planets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The library without the room `planets`, and a model of other classes."
    folder = tmp_path_factory.mktemp("without")
    shutil.copytree(ROOT / "celestial_ml", folder / "celestial_ml", ignore=shutil.ignore_patterns("planets"))
    model = tiny_model(folder / "model") / "model.json"
    write_json(model, read_json(model) | {"classes": [f"pet {i}" for i in range(10)]})
    return folder


@pytest.mark.parametrize("part", WITHOUT)
def test_it_works_without_planets(without_planets: Path, part: str) -> None:
    code = re.sub(r"^ {8}", "", WITHOUT[part], flags=re.M)
    environment = os.environ | {"PYTHONPATH": str(without_planets), "CELESTIAL_HOME": str(without_planets / "home")}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=without_planets, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
