"""What the tests of the service share: a tiny model, a real server, pictures good and bad."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from programs import is_running

from celestial_ml.core.files import sha256_of
from celestial_ml.core.testing import colour_model
from celestial_ml.package.examples import EXAMPLES, HELD_OUT, write_examples
from celestial_ml.planets.bodies import BODIES
from celestial_ml.planets.renderer import render


def tiny_model(folder: Path) -> Path:
    "A packaged model of ten bodies: red is Mars, blue is Neptune, nearly black is unknown; the others never win."
    examples = {body: render(body) for body in ("Mars", "Moon", "Neptune")}
    means = np.stack([picture.mean(axis=(0, 1)) for picture in examples.values()])
    folder.mkdir(parents=True, exist_ok=True)
    write_examples(folder / EXAMPLES, means, examples, examples.values())
    write_examples(folder / HELD_OUT, np.zeros((10, 1)), BODIES, map(render, BODIES))
    colour_model(
        folder,
        dict.fromkeys(BODIES) | {"Mars": 0, "Neptune": 2},
        version="7",
        files={name: sha256_of(folder / name) for name in (EXAMPLES, HELD_OUT)},
        metrics={"accuracy": 0.9967, "images": 600},
        lineage={"source": "render"},
    )
    return folder


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    "A picture as a file."
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    "A chunk of a PNG."
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def neptune(kind: str = "PNG", **options: object) -> bytes:
    "A good picture."
    return encoded(render("Neptune"), kind, **options)


# As the command `celestial serve` does it, with a prediction log, but on any port that is free.
SERVE = """
from celestial_ml.demo.routes import add_demo
from celestial_ml.monitor.log import service_log
from celestial_ml.serve.server import serve
from celestial_ml.serve.settings import serve_settings
settings = serve_settings()
log = service_log(settings)
try:
    serve({model!r}, port=0, demo=add_demo if {demo} else None, settings=settings, log=log)
finally:
    if log is not None:
        log.close()
"""


class Forked:
    "A program that the suite's fork server has started: what `running` needs of `subprocess.Popen`."

    def __init__(self, server: str, code: str, env: dict[str, str], err: IO[str]):
        out, end = os.pipe()
        with socket.socket(socket.AF_UNIX) as connection, os.fdopen(end, "w"):
            connection.connect(server)
            about = {"code": code, "env": env, "folder": str(Path.cwd())}
            socket.send_fds(connection, [json.dumps(about).encode() + b"\n"], [end, err.fileno()])
            self.pid = int(connection.makefile().readline())
        self.stdout = os.fdopen(out)

    def terminate(self) -> None:
        if is_running(self.pid):
            os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> None:
        until(lambda: not is_running(self.pid), timeout)


@contextmanager
def running(
    model: Path | None,
    log: Path,
    demo: bool = True,
    serve: str | None = None,
    fresh: bool = False,  # as from a shell, also where a suite forks its servers
    **settings: object,
) -> Iterator[str]:
    "A real server in a process of its own, with settings from its environment; yields its URL."
    # With a model through `serve`, as a person starts it; without one, which `serve` refuses, the same by hand.
    code = SERVE.format(model=str(model), demo=demo)
    if serve is not None:
        code = serve
    elif model is None:
        code = (
            "import uvicorn; from celestial_ml.demo.routes import add_demo; from celestial_ml.serve.api import build_app; from celestial_ml.serve.server import open_port;"
            "s = open_port('127.0.0.1', 0); print(f'http://127.0.0.1:{s.getsockname()[1]}', flush=True);"
            f"uvicorn.Server(uvicorn.Config(build_app(None, add_demo if {demo} else None), log_level='warning')).run(sockets=[s])"
        )
    env = os.environ | {"CELESTIAL_HOME": str(log.parent / "home")}
    env |= {
        f"CELESTIAL_{'' if name == 'log_url' else 'SERVE_'}{name.upper()}": str(value)
        for name, value in settings.items()
    }
    with log.open("w") as out:
        process: Forked | subprocess.Popen[str]
        server = os.environ.get("TESTS_FORK_SERVER")
        if server and not fresh:
            process = Forked(server, code, env, out)
        else:
            command = [sys.executable, "-c", code]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True, env=env)
        try:
            assert process.stdout
            found = None
            while not found and (line := process.stdout.readline()):
                found = re.search(r"http://[\d.]+:\d+", line)
            assert found, log.read_text()
            yield found.group()
        finally:
            process.terminate()
            process.wait(20)
            if process.stdout:
                process.stdout.close()


def until(met: Callable[[], object], seconds: float = 60, pause: float = 0.02) -> None:
    "Wait until something is so."
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "that never happened"
        time.sleep(pause)
