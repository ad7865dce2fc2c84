"Other programs, as several test files use them: git, PostgreSQL, a store that speaks S3, a web server, a browser; and what Linux knows of a process."

import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from sqlalchemy import create_engine, text

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a camera
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",  # the network is cut off
)


@contextmanager
def chromium() -> Iterator[Any]:
    "A browser that reaches this machine alone; the test is skipped where there is none."
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    playwright.expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


def violations(page: Any) -> list[tuple[str, str]]:
    "All that axe-core finds on a page, as rule and element."
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [(one["id"], node["html"][:200]) for one in found for node in one["nodes"]]


def git(folder: Path, *arguments: str) -> str:
    "What git prints; it must succeed."
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *author, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def free_port() -> int:
    "A port of this machine that nobody listens on."
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def is_running(pid: int) -> bool:
    "Whether there is such a process; a zombie is none."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends while it is read
        return False


def resident_mb(pid: int | str = "self") -> float:
    "The memory of a process, in megabytes."
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1000


@contextmanager
def web_server(handler: type[BaseHTTPRequestHandler] | Path) -> Iterator[str]:
    "A web server with this handler, or of the files in this folder; yields its URL."
    if isinstance(handler, Path):
        folder = str(handler)

        class Files(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any):
                super().__init__(*arguments, directory=folder)

            def log_message(self, *arguments: object) -> None:
                pass

        handler = Files
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # a browser that leaves hangs up
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def postgresql_programs() -> Path:
    "The folder of PostgreSQL's programs; the test is skipped where there is none."
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    initdb = shutil.which("initdb") or (versions[-1] if versions else None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return Path(initdb).parent


class PostgreSQL:
    "A server of PostgreSQL in a folder; not yet started."

    password = "s3cret/&"  # which a URL must quote

    def __init__(self, folder: Path):
        self.folder, self.port, self.programs = folder, free_port(), postgresql_programs()
        self.as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # it refuses to run as root
        (folder / "password").write_text(self.password)
        if self.as_user:
            shutil.chown(folder, "postgres")
            shutil.chown(folder / "password", "postgres")
        self.call("initdb", "-U", "anna", "-A", "scram-sha-256", "--pwfile", f"{folder}/password")

    def call(self, program: str, *arguments: str) -> None:
        "Call one of PostgreSQL's programs."
        command = [*self.as_user, str(self.programs / program), "-D", f"{self.folder}/data", *arguments]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, cwd=self.folder, check=True, **quiet)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self.call("pg_ctl", "-l", f"{self.folder}/log", "-w", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        self.call("pg_ctl", "-m", mode, "stop")

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://anna:s3cret%2F%26@127.0.0.1:{self.port}/{database}"

    def empty_database(self) -> str:
        "The URL of a database without tables and without connections."
        engine = create_engine(self.url().replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            connection.execute(text(f"SELECT pg_terminate_backend(pid) {others}"))
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        engine.dispose()
        return self.url()


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    "A server of PostgreSQL that runs while the block lasts."
    with TemporaryDirectory() as folder:
        server = PostgreSQL(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def s3_store(folder: Path, *buckets: str) -> Iterator[tuple[subprocess.Popen, dict[str, str]]]:
    "A server that speaks S3 on loopback, with these buckets in a folder; yields it, and the environment of its users."
    for bucket in buckets:
        (folder / bucket).mkdir(parents=True, exist_ok=True)
    rclone = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    port, key, secret = free_port(), f"id-{secrets.token_hex(8)}", f"secret-{secrets.token_hex(8)}"
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}", str(folder)]
    settings = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(port)
            yield server, settings | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        finally:
            server.kill()


def forget_connections() -> None:
    "fsspec keeps a connection with the keys that it began with."
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


def wait_for(port: int, seconds: float = 10) -> None:
    "Wait until somebody listens on a port."
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.05)
