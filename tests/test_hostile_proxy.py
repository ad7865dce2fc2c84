"The service behind a real nginx under a path, with the configuration that the documentation shows."

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from programs import chromium
from serving import neptune, running, tiny_model

from celestial_ml.serve.settings import password_hash

NGINX, ROOT = shutil.which("nginx"), Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(NGINX is None, reason="there is no nginx on this machine")
HTTP = """
daemon off; pid {folder}/pid; error_log {folder}/errors warn; worker_processes 1;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b;
    fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
    {server}
}}
"""


@contextmanager
def behind_nginx(folder: Path, url: str, *changes: tuple[str, str]) -> Iterator[str]:
    "The documented configuration, with the addresses of this test; yields the URL of the service's path."
    folder.mkdir()
    [server] = re.findall(r"```nginx\n(.*?)```", (ROOT / "nbs/operations.md").read_text(), re.S)
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    for old, new in (("listen 80;", f"listen 127.0.0.1:{port};"), ("http://127.0.0.1:8000", url), *changes):
        assert server.count(old) == 1
        server = server.replace(old, new)
    (folder / "nginx.conf").write_text(HTTP.format(folder=folder, server=server))
    process = subprocess.Popen([NGINX, "-c", folder / "nginx.conf", "-p", folder], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None and time.monotonic() < end, (folder / "errors").read_text()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/planets/"
    finally:
        process.terminate()
        process.wait(10)


NO_PREFIX = ("proxy_set_header X-Forwarded-Prefix /planets;", "")


WAYS = ["header, stripped", "setting, kept"]
WAYS += [pytest.param(way, marks=pytest.mark.slow) for way in ("header, kept", "setting, stripped")]


@pytest.fixture(scope="module", params=WAYS)
def site(request, tmp_path_factory) -> Iterator[tuple[str, str]]:
    "The URL behind nginx, and the service's own."
    way, stripped = request.param.split(", ")
    folder = tmp_path_factory.mktemp("site")
    settings = {"root_path": "/planets"} if way == "setting" else {}
    with running(tiny_model(folder / "model"), folder / "log", trusted_proxies="127.0.0.1", **settings) as url:
        changes = [(f"proxy_pass {url}/;", f"proxy_pass {url};")] if stripped == "kept" else []
        with behind_nginx(folder / "nginx", url, *changes, *([NO_PREFIX] if settings else [])) as base:
            yield base, url


def test_a_path_behind_nginx(site: tuple[str, str]) -> None:
    base, _ = site
    with httpx.Client(timeout=20) as client:
        assert client.get(f"{base}health").json()["status"] == "alive"
        assert client.post(f"{base}predict", files={"image": neptune()}).json()["label"] == "Neptune"
        assert client.get(f"{base}nowhere-at-all").status_code == 404
        assert client.get(f"{base}openapi.json").json()["servers"] == [{"url": "/planets"}]
        assert client.get(base.rstrip("/"), follow_redirects=True).status_code == 200
        for page in ("docs", ""):
            text = client.get(base + page).text
            links = re.findall(r"""(?:src|href)=["']([^"']+)["']|url: '([^']+)'""", text)
            assets = [one or other for one, other in links if "manifest" not in one]  # of an app that one can install
            assert len(assets) >= 3
            for link in assets:
                target = urljoin(base + page, link)
                assert target.startswith(base) and client.get(target).status_code == 200, target
        assert client.get(f"{base}config").json()["root"] == base.rstrip("/")


def test_the_demo_answers_behind_nginx(site: tuple[str, str]) -> None:
    base, _ = site
    with httpx.Client(base_url=base, timeout=20) as client:
        [path] = client.post("gradio_api/upload", files={"files": ("n.png", neptune())}).json()
        assert path.endswith("n.png")
        config = client.get("config").json()
        heartbeat = client.stream("GET", "gradio_api/heartbeat/abc")
        with heartbeat as stream:
            assert next(stream.iter_text())
        loads = (one for one in config["dependencies"] if ["load"] in [target[1:] for target in one["targets"]])
        load = next(one for one in loads if not one["inputs"])
        join = {"data": [], "fn_index": load["id"], "session_hash": "abc"}
        assert client.post("gradio_api/queue/join", json=join).status_code == 200
        with client.stream("GET", "gradio_api/queue/data?session_hash=abc") as stream:
            assert any("process_completed" in line for line in stream.iter_lines())


def test_login_behind_nginx_and_the_address_that_counts(tmp_path: Path) -> None:
    settings = {"demo_login": f"me:{password_hash('per aspera')}", "rate_limit": "3/minute"}
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", trusted_proxies="127.0.0.1", **settings) as url:
        with behind_nginx(tmp_path / "nginx", url) as base, httpx.Client(base_url=base, timeout=20) as client:
            refused = client.get("config")
            assert refused.status_code == 401 and set(refused.json()["error"]) == {"code", "message", "hint"}
            assert "'" not in refused.json()["error"]["message"], "no Python dict"
            assert "planets" in client.get("").text
            inside = client.post("login", data={"username": "me", "password": "per aspera"})
            assert inside.status_code == 200 and client.get("config").status_code == 200
        # A proxy that is trusted says who asks; the last that isn't a proxy counts, whatever a client wrote before.
        codes = []
        for i in range(5):
            claim = {"X-Forwarded-For": f"1.1.1.{i}, 9.9.9.9"}
            codes.append(httpx.get(f"{url}/model", headers=claim).status_code)
        assert codes == [200, 200, 200, 429, 429]
        assert httpx.get(f"{url}/model", headers={"X-Forwarded-For": "9.9.9.8"}).status_code == 200
    assert '"address": "9.9.9.9"' in (tmp_path / "log").read_text()


def test_forwarded_addresses_are_ignored_without_the_setting(tmp_path: Path) -> None:
    claims = {"X-Forwarded-Host": "evil.org", "X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/evil"}
    claims |= {"Forwarded": "for=9.9.9.9;host=evil.org", "X-Gradio-Server": "http://evil.org"}
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", rate_limit="3/minute") as url:
        for path in ("/", "/config", "/docs", "/openapi.json", "/nowhere"):
            assert "evil" not in httpx.get(url + path, headers=claims).text
        codes = [httpx.get(f"{url}/model", headers={"X-Forwarded-For": f"9.9.9.{i}"}).status_code for i in range(5)]
        assert codes == [200, 200, 200, 429, 429]
    assert "9.9.9" not in (tmp_path / "log").read_text()


@pytest.mark.browser
def test_a_person_sees_an_answer_behind_nginx(site: tuple[str, str]) -> None:
    base, _ = site
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with chromium() as browser:
        page = browser.new_page()
        page.goto(base)
        picture = {"name": "n.png", "mimeType": "image/png", "buffer": neptune()}
        page.locator("input[type=file]").first.set_input_files(picture)
        playwright.expect(page.locator("#right h2")).to_have_text("Neptune")
