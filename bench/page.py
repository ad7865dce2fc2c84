"""The demo: from opening the page to the answer for a picture, beside a plain `gr.Interface` around the Keras model. Needs Chromium."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import PEER, Row, environment, in_turn
from bench.lab import FLAGS
from bench.serving import ours, serving
from celestial_ml.core.files import read_json

WHY = "Most of it is the page's own start in the browser: 83 components on seven tabs, where the plain page has four."


def first_answer(browser: Any, url: str, drop: Callable[[Any], None], answer: str) -> float:
    "Seconds from opening the page to the answer."
    page = browser.new_page()
    try:
        began = time.perf_counter()
        page.goto(url)
        drop(page)
        page.locator(answer).first.wait_for(timeout=60_000)
        return time.perf_counter() - began
    finally:
        page.close()


def page_rows(run: Path, picture: Path, times: int) -> list[Row]:
    "A person's first answer."
    from playwright.sync_api import sync_playwright

    def ask_ours(page: Any) -> None:
        page.locator("#drop input[type=file]").set_input_files(picture)

    def ask_peer(page: Any) -> None:
        page.locator("input[type=file]").first.set_input_files(picture)
        page.locator("img").first.wait_for()
        page.get_by_role("button", name="Submit").click()

    about = {"PEER_MODEL": str(run / "model.keras"), "PEER_CLASSES": ",".join(read_json(run / "model.json")["classes"])}
    if (python := environment("keras")) is None:
        return []
    plain = [str(python), str(PEER / "gradio_page.py")]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with (
        tempfile.TemporaryDirectory() as home,
        ours(run, Path(home), "--demo") as service,
        serving(plain, "/", TF_CPP_MIN_LOG_LEVEL="3", NO_PROXY="127.0.0.1", **about) as peer,
        sync_playwright() as p,
    ):
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        urls = [f"http://127.0.0.1:{one.port}/" for one in (service, peer)]
        ways = {
            "ours": lambda: first_answer(browser, urls[0], ask_ours, "#right h2"),
            "peer": lambda: first_answer(browser, urls[1], ask_peer, ".output-class"),
        }
        for way in ways.values():  # warm
            way()
        took = in_turn(times, **ways)
        browser.close()
        start = Row(
            "the demo's start, until its page answers",
            "s",
            [service.start],
            {"gr.Interface with Keras": [peer.start]},
            goal=1.0,
        )
    beside = {"gr.Interface with Keras": took["peer"]}
    return [
        Row("the first answer in the demo", "s", took["ours"], beside, goal=1.0, why=WHY),
        start,
    ]
