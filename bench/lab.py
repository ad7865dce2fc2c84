"""`make lab`: seconds from the shell to a page that can be used, beside a bare JupyterLab's.

Needs Chromium.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from bench import Row, in_turn
from celestial_ml.core.files import project_root, read_json
from celestial_ml.workbench.lab import ASSETS

OURS = ["-m", "celestial_ml.workbench.lab"]
BARE = ["-m", "jupyterlab", "--ServerApp.log_level=WARN", "--LabApp.news_url=None"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def wait_for_url(runtime: Path) -> str:
    "Where the server is, as soon as it answers."
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for path in runtime.glob("jpserver-*.json"):
            try:
                server = read_json(path)
                urlopen(f"{server['url']}api", timeout=5).close()
                return f"{server['url']}lab?token={server['token']}"
            except (OSError, ValueError):
                pass
        time.sleep(0.02)
    sys.exit("the server didn't answer within two minutes")


def time_to_page(command: list[str], shown: str, browser: Any, open_at: str = "") -> float:
    "Seconds until something is visible on the page of a server that is started now."
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"JUPYTER_RUNTIME_DIR": f"{folder}/runtime", "CELESTIAL_HOME": f"{folder}/home"}
        env |= {"JUPYTERLAB_WORKSPACES_DIR": f"{folder}/workspaces"}
        env["JUPYTER_CONFIG_PATH"] = str(project_root() / ASSETS)  # with Ploomber's extension no page works
        page = browser.new_page()
        began = time.perf_counter()
        words = [sys.executable, *command, "--no-browser", "--allow-root"]
        server = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            page.goto(wait_for_url(Path(folder) / "runtime").replace("lab?", f"lab{open_at}?"))
            page.locator(shown).first.wait_for(timeout=120_000)
            return time.perf_counter() - began
        finally:
            page.close()
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def lab_rows(times: int = 3) -> list[Row]:
    "Ours with its notebook on the page, in turn with a bare one's list of files."
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        took = in_turn(
            times,
            ours=lambda: time_to_page(OURS, ".jp-NotebookPanel .jp-Cell", browser, "/workspaces/celestial"),
            bare=lambda: time_to_page(BARE, ".jp-DirListing-item", browser),
        )
        browser.close()
    bare = {"bare jupyter lab, until its list of files": took["bare"]}
    return [Row("make lab, until a notebook is on the page", "s", took["ours"], bare, goal=0.6)]
