"The labelling page in a real browser, for somebody who is logged in and for everybody else."

import os
from pathlib import Path

import httpx
import pytest
from programs import chromium, violations
from serving import encoded, running, tiny_model

from celestial_ml.core.files import sha256_of
from celestial_ml.core.testing import TemporaryHome
from celestial_ml.label.queue import Waiting, enqueue
from celestial_ml.label.store import read_judgements
from celestial_ml.planets.renderer import render
from celestial_ml.serve.settings import password_hash

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser

SERVE = (
    "from celestial_ml.label.page import add_labelled_demo; from celestial_ml.serve.server import serve;"
    "serve({model!r}, port=0, demo=add_labelled_demo)"
)
SHOTS = os.environ.get("CELESTIAL_LABEL_SHOTS")


@pytest.fixture
def home(tmp_path):
    "A state folder with four pictures in the queue."
    with TemporaryHome() as home:
        os.environ["CELESTIAL_HOME"] = str(tmp_path / "home")
        pictures = {
            sha256_of(one): one for one in (encoded(render(body)) for body in ("Mars", "Neptune", "Moon", "Pluto"))
        }
        about = {"guess": "Mars", "confidence": 0.91, "model_version": "tiny/7"}
        enqueue([Waiting(sha, time=i, known=i != 1, **about) for i, sha in enumerate(pictures)], pictures)
        home.pictures = list(pictures)
        yield home


def opened(browser, url, asked, complaints, **options):
    "The page of somebody who has logged in, at the tab."
    page = browser.new_page(reduced_motion="reduce", **options)
    page.set_default_timeout(90_000)
    page.on("console", lambda one: complaints.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda one: complaints.append(str(one)))
    page.on("request", lambda one: asked.add(one.url.split("/")[2]) if one.url.startswith("http") else None)
    page.goto(url)
    page.get_by_label("username").fill("anna")
    page.get_by_label("password").fill("per aspera")
    page.get_by_role("button", name="Login").click()
    page.get_by_role("tab", name="Label").click()
    page.locator(".labelling").wait_for()
    return page


def shoot(page, name):
    "A picture for a person to look at."
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def test_a_person_labels_with_the_keyboard(tmp_path, home):
    login = f"anna:{password_hash('per aspera')}"
    serve, log = SERVE.format(model=str(tiny_model(tmp_path / "model"))), tmp_path / "log"
    asked: set[str] = set()
    complaints: list[str] = []
    with chromium() as browser, running(None, log, serve=serve, demo_login=login) as url:
        stranger = httpx.get(f"{url}/config")
        assert stranger.status_code == 401 and "data-sha256" not in httpx.get(url).text
        page = opened(browser, url, asked, complaints, viewport={"width": 1280, "height": 900})
        desk, expect = page.locator(".labelling"), playwright.expect
        first, second, third, fourth = home.pictures
        shown = lambda sha: expect(desk).to_have_attribute("data-sha256", sha)  # noqa: E731
        shown(first)
        expect(desk.locator("h2")).to_contain_text("Mars, 91")
        shoot(page, "desk-light")
        assert violations(page) == []
        page.keyboard.press("3")  # Mars is the third of the model's classes
        shown(second)
        page.keyboard.press("s")
        shown(third)
        page.keyboard.press("u")
        shown(second)
        page.keyboard.press("n")
        page.keyboard.type("Ceres 3s")  # keys are letters while a person types
        page.keyboard.press("Enter")
        shown(third)
        expect(desk.get_by_role("button", name="Ceres 3s")).to_be_visible()
        page.keyboard.press("0")
        shown(fourth)
        page.keyboard.press("n")
        page.keyboard.type("mars")
        page.keyboard.press("Enter")
        expect(desk.get_by_role("alert")).to_contain_text("differ by case")
        page.close()  # going elsewhere would cut Gradio's stream of events, of which it complains
        page = opened(browser, url, asked, complaints, viewport={"width": 390, "height": 844}, color_scheme="dark")
        desk = page.locator(".labelling")
        shown(fourth)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert violations(page) == []
        shoot(page, "phone-dark")
        page.get_by_role("button", name="Skip").click()
        expect(desk).to_contain_text("Nothing waits")
        page.close()
        labels = {one.sha256: (one.label, one.annotator, one.source, one.model_version) for one in read_judgements()}
        assert labels == {
            sha: (label, "anna", "page", "tiny/7")
            for sha, label in ((first, "Mars"), (second, "Ceres 3s"), (third, "unknown"))
        }
    assert complaints == [] and asked == {url.split("/")[2]}
    assert "Traceback" not in log.read_text()


def test_without_a_login_it_stays_off(tmp_path, home):
    with running(None, tmp_path / "log", serve=SERVE.format(model=str(tiny_model(tmp_path / "model")))) as url:
        config = httpx.get(f"{url}/config").json()
        desk = next(one for one in config["components"] if one["props"].get("elem_id") == "label-desk")
        assert "celestial keys login" in desk["props"]["value"]
        assert not [
            call for call in config["dependencies"] if [desk["id"], "click"] in [list(t) for t in call["targets"]]
        ]
