"""The demo in a real browser: what a person sees, by day and by night, at a desk and on a phone.

`CELESTIAL_SCREENSHOTS=1` writes the pictures of the documentation to nbs/images, with the model that
`CELESTIAL_MODEL` names.
"""

import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from serving import encoded, neptune, running, tiny_model

from celestial_ml.data.bodies import BODIES
from celestial_ml.data.render import render
from celestial_ml.serve.predictor import find_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]

SCREENSHOTS = Path(__file__).parents[1] / "nbs" / "images" if os.environ.get("CELESTIAL_SCREENSHOTS") else None
# Notes what a person sees, each time the page changes: the headline, and what stands where the reasons will.
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const why = document.querySelector("#why .why"), said = document.querySelector("#right h2").innerText;
    const now = `${said}, ${why.querySelector("img.map") ? "map" : why.querySelector(".plain").innerText}`;
    if (window.seen.at(-1) !== now) window.seen.push(now);
  }).observe(document.querySelector("#desk"), {subtree: true, childList: true, characterData: true});
}"""
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    model = find_model() if SCREENSHOTS else tiny_model(folder / "model")
    with running(model, folder / "log") as url:
        yield url
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    "Opens the demo; at the end the browser must have had nothing to complain of, and asked nobody else."
    contexts, complaints, hosts = [], [], set()

    def opener(viewport=DESK, scheme="dark"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status} {r.url}"))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(url)
        page.get_by_role("button", name="Saturn").wait_for()
        return page

    yield opener
    for context in contexts:
        context.close()
    assert not complaints
    assert hosts - {""} == {urlsplit(url).netloc}  # "" are pictures inside of the page


def headline(page, text):
    "Wait until the answer says this."
    playwright.expect(page.locator("#right h2")).to_have_text(text)


def drop(page, name, content, mime="image/png"):
    "Choose a file."
    page.locator("#drop input[type=file]").set_input_files({"name": name, "mimeType": mime, "buffer": content})


def sideways(page):
    "By how much the page is wider than the window."
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def shoot(page, name, tmp_path):
    "A picture of the page, small enough to be committed."
    page.evaluate("Promise.all([...document.images].map(i => i.decode()))")
    page.mouse.move(0, 0)
    folder = SCREENSHOTS or tmp_path
    page.screenshot(path=folder / name, full_page=True)
    with Image.open(folder / name) as image:  # the last two bits of a gradient are most of the file
        image.convert("RGB").point(lambda value: value & 0xFC).save(folder / name, optimize=True)
    assert (folder / name).stat().st_size < 300_000


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_look(open_page, tmp_path, viewport, scheme):
    page = open_page(viewport, scheme)
    assert sideways(page) == 0
    saturn = page.get_by_role("button", name="Saturn")
    saturn.click()
    page.locator("#right li").first.wait_for()
    assert page.locator("#left img").get_attribute("alt") == "Example: Saturn"
    assert page.locator("#right li").count() == 10
    page.locator("#why img.map").wait_for()
    assert page.locator("#why li").count() == 3
    assert sideways(page) == 0
    paper = page.evaluate("getComputedStyle(document.querySelector('#right')).backgroundColor")
    dark = sum(int(part) for part in re.findall(r"\d+", paper)[:3]) < 3 * 128
    assert dark == (scheme == "dark")
    name = {(1280, "dark"): "demo", (1280, "light"): "demo-light", (390, "dark"): "demo-phone"}
    shoot(page, f"{name.get((viewport['width'], scheme), 'demo-phone-light')}.png", tmp_path)


@pytest.mark.skipif(SCREENSHOTS is not None, reason="the answers are those of the tiny model")
class TestAnswers:
    def test_examples(self, open_page):
        page = open_page()
        for body in BODIES:
            assert page.get_by_role("button", name=body).is_visible()
        page.get_by_role("button", name="Mars").click()
        headline(page, "Mars")
        plain = page.locator("#right .plain")
        playwright.expect(plain).to_contain_text("This is Mars.")
        playwright.expect(plain).to_contain_text("it was right on 598 of 600 pictures it had never seen")
        page.get_by_role("button", name="Neptune").click()
        headline(page, "Neptune")
        assert "Model 7" in page.locator("#foot").inner_text()

    def test_the_same_answer_as_the_api(self, open_page, url):
        import httpx

        page = open_page()
        drop(page, "mine.png", neptune())
        headline(page, "Neptune")
        answer = httpx.post(f"{url}/predict", files={"image": neptune()}).json()
        shown = page.locator("#right li.best span").last.inner_text()
        assert answer["label"] == "Neptune" and answer["confidence"] > 0.999 and shown == "> 99.9\N{NO-BREAK SPACE}%"

    def test_one_picture_after_another(self, open_page):
        page = open_page()
        for body in ("Neptune", "Mars", "Neptune"):
            drop(page, f"{body}.png", encoded(render(body)))
            headline(page, body)

    def test_unknown(self, open_page):
        page = open_page()
        drop(page, "black.png", encoded(Image.new("RGB", (64, 64))))
        headline(page, "Nothing I know")
        playwright.expect(page.locator("#right .plain")).to_contain_text("none of the ten bodies I know")
        why = page.get_by_role("region", name="Why")
        playwright.expect(why).to_contain_text("No part stands out")  # there is nothing to cover in the dark
        playwright.expect(why).to_contain_text("Looks most like")

    def test_why(self, open_page):
        page = open_page()
        why = page.get_by_role("region", name="Why")
        playwright.expect(why).to_contain_text("With the answer comes what it rests on")
        drop(page, "mine.png", neptune())
        playwright.expect(why).to_contain_text("Bright is what the answer rests on.")
        assert why.get_by_role("img").first.get_attribute("alt") == "Map over the picture, brightest in the middle"
        near = page.get_by_role("list", name="Training pictures").get_by_role("listitem")
        assert near.count() == 3 and near.first.inner_text() == "Neptune"
        sizes = page.evaluate("[...document.querySelectorAll('#why img')].map(i => i.complete && i.naturalWidth)")
        assert all(sizes) and len(sizes) == 4

    def test_the_answer_does_not_wait_for_its_reasons(self, open_page):
        page = open_page()
        page.evaluate(WATCH)
        page.get_by_role("button", name="Neptune").click()
        page.locator("#why img.map").wait_for()
        seen = page.evaluate("window.seen")
        assert seen[-2:] == ["Neptune, Looking closer…", "Neptune, map"]

    def test_the_reasons_are_those_of_the_picture_that_is_shown(self, open_page):
        page = open_page()
        for body in ("Mars", "Neptune", "Mars", "Neptune", "Mars", "Neptune"):
            page.get_by_role("button", name=body).click()
        headline(page, "Neptune")
        near = page.get_by_role("list", name="Training pictures").get_by_role("listitem").first
        playwright.expect(near).to_have_text("Neptune")
        page.wait_for_timeout(1000)  # a late one of Mars would have come by now
        assert near.inner_text() == "Neptune"

    def test_no_reasons_without_an_answer(self, open_page):
        page = open_page()
        page.get_by_role("button", name="Neptune").click()
        page.locator("#why img.map").wait_for()
        drop(page, "letter.jpg", b"Dear planet", "image/jpeg")
        playwright.expect(page.locator("#right .plain")).to_contain_text("I can't see a picture")
        playwright.expect(page.locator("#why .plain")).to_contain_text("With the answer comes")
        assert page.locator("#why img").count() == 0

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("letter.jpg", b"Dear planet", "I can't see a picture in that file"),
            ("nothing.jpg", b"", "That file is empty"),
            ("half.png", neptune()[:2000], "That picture is damaged"),
            ("huge.png", bytes(21_000_000), "That picture is larger than I can take"),
        ],
    )
    def test_bad_files_get_a_sentence(self, open_page, name, content, words):
        page = open_page()
        drop(page, name, content)
        playwright.expect(page.locator("#right .plain")).to_contain_text(words)
        assert page.locator(".toast-wrap .error").count() == 0
        drop(page, "good.png", neptune())
        headline(page, "Neptune")

    def test_keyboard(self, open_page):
        page = open_page()
        page.get_by_role("button", name="Earth").focus()
        for _ in range(5):
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.innerText.trim()") == "Neptune"
        page.keyboard.press("Enter")
        headline(page, "Neptune")
        for _ in range(6):
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('#drop') !== null")

    def test_docs_page(self, open_page, url):
        page = open_page()
        page.get_by_role("link", name="the API").click()
        page.get_by_text("/predict", exact=True).first.wait_for()
        assert page.url == f"{url}/docs"
