"The service under load, beside the guide's own way of serving the same model: the same pictures, the same core."

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx
import numpy as np
import pandas as pd

from bench import CELESTIAL, Row
from bench.load import Tally, as_request, encoded, load
from bench.sweep import copy_project
from celestial_ml.core.files import project_root, read_json, write_json
from celestial_ml.data.images import decode_image
from celestial_ml.planets.bodies import BODIES
from celestial_ml.planets.renderer import render
from celestial_ml.serve.predictor import Predictor

SERVER_CORE, CLIENT_CORE = 0, 1
PEER = Path(__file__).with_name("peer")


def on_core(core: int) -> None:
    "Keep this process on one core, where the system can do that."
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core % (os.cpu_count() or 1)})


def tree(pid: int) -> list[int]:
    "A process and all below it, whichever thread has started them."
    below: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread, or the child, has ended meanwhile
            below += [one for child in file.read_text().split() for one in tree(int(child))]
    return [pid, *below]


def resident_mb(pid: int) -> float:
    "Megabytes of memory that a process and all below it take; what they share counts once."
    lines = [Path(f"/proc/{one}/smaps_rollup").read_text().split("Pss:")[1] for one in tree(pid)]
    return sum(int(line.split()[0]) for line in lines) / 1000


def free_port() -> int:
    "A port that nobody has."
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


class Serving:
    "A service in a process of its own, on its own core."

    def __init__(
        self,
        command: list[str],
        ready: str,  # path that answers 200 then
        prepare: Callable[[], None] = lambda: on_core(SERVER_CORE),  # in the process, before it starts
        output: int | IO[str] = subprocess.DEVNULL,
        **env: str,
    ):
        self.port = free_port()
        command = [*command, "--port", str(self.port)]
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            env=os.environ | env,
            cwd=env.get("PEER_FOLDER"),
            stdout=output,
            stderr=output,
            preexec_fn=prepare,
            start_new_session=True,
        )
        self.wait(f"http://127.0.0.1:{self.port}{ready}")
        self.start = time.perf_counter() - began

    def wait(self, url: str, seconds: float = 180) -> None:
        "Until it is ready."
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and self.process.poll() is None:
            try:
                if httpx.get(url, timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.02)
        self.end(0)
        sys.exit(f"{self.process.args} was never ready")

    def end(self, seconds: float = 30) -> None:
        "Ask it to end; then end it, and all below it."
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@contextmanager
def serving(command: list[str], ready: str, **env: str) -> Iterator[Serving]:
    "A service, and its end."
    service = Serving(command, ready, **env)
    try:
        yield service
    finally:
        service.end()


def ours(model: Path | None, home: Path, *options: str, **settings: str) -> object:
    "`celestial serve`, with its prediction log and its access log, as anybody starts it."
    env = {"CELESTIAL_HOME": str(home)} | {
        f"CELESTIAL_{'' if name == 'log_url' else 'SERVE_'}{name.upper()}": value for name, value in settings.items()
    }
    command = [CELESTIAL, "serve", *(["--model", str(model)] if model else []), *(options or ["--no-demo"])]
    return serving(command, "/ready", **env)


def peer_python() -> Path | None:
    "The peer's own environment, set up when it's missing; None where that fails."
    folder = Path(".cache/bench-peer").resolve()
    python = folder / "bin/python"
    wanted = (PEER / "requirements.txt").read_text()
    if (folder / "ready").exists() and (folder / "ready").read_text() == wanted:
        return python
    print("setting up the peer's environment: once, some minutes", flush=True)
    uv = shutil.which("uv")
    make = [uv, "venv", "-q", "--clear", "-p", sys.executable, folder] if uv else [sys.executable, "-m", "venv", folder]
    install = [uv, "pip", "install", "-q", "--python", python] if uv else [python, "-m", "pip", "install", "-q"]
    for command in (make, [*install, "-r", PEER / "requirements.txt"]):
        if subprocess.run(command).returncode:
            return None
    (folder / "ready").write_text(wanted)
    return python


def peer(model: Path, python: Path) -> object:
    "The guide's way: BentoML with the Keras model."
    classes = ",".join(read_json(model / "model.json")["classes"])
    about = {"PEER_MODEL": str((model / "model.keras").resolve()), "PEER_CLASSES": classes, "PEER_FOLDER": str(PEER)}
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return serving(
        [str(python.with_name("bentoml")), "serve", "service:CelestialBodiesClassifier"], "/readyz", **about, **quiet
    )


_LIMIT = """
import sys, time
from pathlib import Path
from celestial_ml.data.images import decode_image
from celestial_ml.serve.predictor import Predictor
predictor, contents = Predictor(sys.argv[1], threads=1), [Path(path).read_bytes() for path in sys.stdin.read().split()]
for content in contents:
    predictor.run(decode_image(content))
best = 0
for _ in range(5):
    began = time.perf_counter()
    for content in contents:
        predictor.run(decode_image(content))
    best = max(best, len(contents) / (time.perf_counter() - began))
print(best)
"""


def limit(model: Path, paths: list[Path]) -> float:
    "Pictures a second of decoding and inference in a loop, on the server's core."
    result = subprocess.run(
        [sys.executable, "-c", _LIMIT, str(model)],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: on_core(SERVER_CORE),
    )
    return float(result.stdout)


def measure(service: Serving, requests: list[bytes], clients: int, **how: float) -> Tally:
    "Load on a service that is warm, in which every request must be answered."
    tally = load(service.port, requests, clients, **how)
    if tally.broken or set(tally.statuses) != {200}:
        sys.exit(f"{tally.broken} broken connections, {dict(tally.statuses)}")
    return tally


def cost_of_logging(model: Path, home: Path, requests: list[bytes]) -> tuple[float, float]:
    "Answers a second without a prediction log and with one, side by side, as the medians of short turns."
    with ours(model, home / "a", log_url="off") as without, ours(model, home / "b") as kept:
        rates: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(6):
            for i, service in enumerate((without, kept)):
                rates[i].append(measure(service, requests, 16, seconds=2).rate)
    return tuple(sorted(found)[len(found) // 2] for found in rates.values())  # type: ignore[return-value]


def serving_figures(run: str, swaps: int = 100_000) -> list[Row]:
    "All rows about the service."
    model = (Path("output") / run).resolve()
    paths = [Path(path).resolve() for path in pd.read_parquet(model / "predictions.parquet").path][:200]
    contents = [path.read_bytes() for path in paths]
    requests, before = [as_request(content) for content in contents], os.sched_getaffinity(0)
    python = peer_python()
    on_core(CLIENT_CORE)
    try:
        with tempfile.TemporaryDirectory() as home:
            rows = alone(model, Path(home), requests, paths, python)
            rows += [swap_row(model, Path(home) / "swaps", contents, swaps)] if swaps else []
    finally:
        os.sched_setaffinity(0, before)
    return rows


def alone(model: Path, home: Path, requests: list[bytes], paths: list[Path], python: Path | None) -> list[Row]:
    "One worker on one core, without and beside the peer's."
    most = limit(model, paths)
    with ours(model, home) as service:
        start, _ = service.start, measure(service, requests, 4, seconds=2)
        one, eight, full = (measure(service, requests, clients, seconds=5) for clients in (1, 8, 16))
        half = measure(service, requests, 8, seconds=5, rate=full.rate / 2)
        memory = resident_mb(service.process.pid)
        protocol = protocol_rows(
            service, read_json(model / "model.json")["name"], [path.read_bytes() for path in paths]
        )
    with ours(model, home, "--demo") as service:
        demo_start, demo_memory = service.start, resident_mb(service.process.pid)
    without, kept = cost_of_logging(model, home, requests)
    rows = [
        (
            "/predict, throughput on one core",
            f"{full.rate:.0f}/s",
            f"decoding and inference alone {most:.0f}/s",
            f"{full.rate / most:.0%}",
        ),
        (
            "/predict at half load",
            f"p50 {half.percentile(50):.1f} ms",
            f"p99 {half.percentile(99):.1f} ms",
            f"{half.rate:.0f}/s",
        ),
        *protocol,
        ("the prediction log", f"{kept:.0f}/s with it", f"{without:.0f}/s without", f"{1 - kept / without:+.1%}"),
    ]
    if python is None:
        return [*rows, ("the peer's service", "not measured", "its environment could not be set up", "")]
    with peer(model, python) as service:
        pictures = [as_request(path.read_bytes(), headers="", kind="image/jpeg") for path in paths]
        measure(service, pictures, 1, seconds=3)
        theirs = [measure(service, pictures, clients, seconds=8) for clients in (1, 8)]
        bento_start, bento_memory = service.start, resident_mb(service.process.pid)
    best = max(tally.rate for tally in theirs)
    return [
        *rows,
        against("throughput", f"{full.rate:.0f}/s", f"{best:.0f}/s", full.rate / best),
        *(
            against(
                f"p50, {clients}",
                f"{a.percentile(50):.1f} ms",
                f"{b.percentile(50):.0f} ms",
                a.percentile(50) / b.percentile(50),
            )
            for clients, a, b in zip(("1 client", "8 clients"), (one, eight), theirs, strict=True)
        ),
        against("start to ready", f"{start:.1f} s", f"{bento_start:.1f} s", start / bento_start),
        against("memory", f"{memory:.0f} MB", f"{bento_memory:.0f} MB", memory / bento_memory),
        against("start with the demo", f"{demo_start:.1f} s", f"{bento_start:.1f} s", demo_start / bento_start),
        against("memory with the demo", f"{demo_memory:.0f} MB", f"{bento_memory:.0f} MB", demo_memory / bento_memory),
    ]


def as_tensors(
    model: str,
    contents: list[bytes],  # of one picture: its file, or its pixels
    datatype: str,  # BYTES or UINT8
    shape: tuple[int, ...],
) -> bytes:
    "A whole request of the Open Inference Protocol, with its binary extension both ways."
    content = b"".join(len(one).to_bytes(4, "little") + one for one in contents) if datatype == "BYTES" else contents[0]
    size = {"binary_data_size": len(content)}
    tensor = {"name": "image", "datatype": datatype, "shape": shape, "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    lines = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: here\r\nContent-Type: application/octet-stream\r\n"
    lengths = f"Inference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + len(content)}\r\n\r\n"
    return (lines + lengths).encode() + head + content


def protocol_rows(service: Serving, name: str, contents: list[bytes]) -> list[Row]:
    "The Open Inference Protocol beside /predict, turn by turn: the same pictures as files, and their pixels."
    pixels = [decode_image(content) for content in contents]
    ways = {
        "/predict": [as_request(content) for content in contents],
        "OIP, files": [as_tensors(name, [content], "BYTES", (1,)) for content in contents],
        "OIP, pixels": [as_tensors(name, [one.tobytes()], "UINT8", (1, *one.shape)) for one in pixels],
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(2 * TURNS):
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            rates[way].append(measure(service, ways[way], 16, seconds=1.5).rate)
    predict, rows = np.array(rates.pop("/predict")), []
    for way, some in rates.items():
        ratio = float(np.median(np.array(some) / predict))
        verdict = " MISSED" if ratio < 0.9 and way == "OIP, files" else ""
        medians = f"{np.median(some):.0f}/s", f"/predict {np.median(predict):.0f}/s"
        rows.append((f"{way}, binary extension", *medians, f"{ratio:.2f} ×{verdict}"))
    return rows


def ordinary_pictures() -> dict[str, list[bytes]]:
    "Files as people send them."
    sizes = {"128 px JPEG": (128, "JPEG"), "512 px PNG": (512, "PNG"), "1 megapixel JPEG": (1000, "JPEG")}
    return {name: [encoded(render(body, size=size), kind) for body in BODIES] for name, (size, kind) in sizes.items()}


def in_turns(services: list[Serving], requests: list[bytes], clients: int, seconds: float) -> list[list[Tally]]:
    "What two services do with the same load, one after the other, again and again; who is first changes."
    tallies: list[list[Tally]] = [[], []]
    for turn in range(TURNS):
        for i in (0, 1) if turn % 2 else (1, 0):
            tallies[i].append(measure(services[i], requests, clients, seconds=seconds))
    return tallies


TURNS = 6
ALLOWED = 0.05  # that it may be worse than another checkout


def checkout_rows(kind: str, services: list[Serving], contents: list[bytes]) -> list[Row]:
    "Throughput and p50 of one kind of picture: this checkout's, the other's, and the median of the turns' ratios."
    requests = [as_request(content) for content in contents]
    full, alone = (in_turns(services, requests, clients, seconds) for clients, seconds in ((16, 2), (1, 1)))
    rates = np.array([[one.rate for one in tallies] for tallies in full])
    p50s = np.array([[one.percentile(50) for one in tallies] for tallies in alone])
    rows = []
    for what, (here, there), unit, sign in (("throughput", rates, "/s", -1), ("p50", p50s, " ms", 1)):
        ratio = float(np.median(here / there))
        verdict = " MISSED" if sign * (ratio - 1) > ALLOWED else ""
        medians = [f"{np.median(one):.{0 if sign < 0 else 2}f}{unit}" for one in (here, there)]
        rows.append((f"/predict, {kind}, {what}", medians[0], f"the other {medians[1]}", f"{ratio:.3f} ×{verdict}"))
    return rows


def checkout_figures(run: str, other: Path) -> list[Row]:
    "This checkout beside another one, turn by turn on the same core; each serves a model that its own code has packaged."
    roots, before, rows = [project_root(), other.resolve()], os.sched_getaffinity(0), []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        homes = [Path(name) / side for side in ("here", "there")]
        models = [root / "output" / run for root in roots]
        if not all((model / "model.onnx").exists() for model in models):
            models = [smoke_model(root, home / "run") for root, home in zip(roots, homes, strict=True)]
        on_core(CLIENT_CORE)
        try:
            services = [
                stack.enter_context(
                    serving(
                        [CELESTIAL, "serve", "--model", str(model), "--no-demo"],
                        "/ready",
                        PYTHONPATH=str(root),
                        CELESTIAL_HOME=str(home),
                    )
                )
                for root, model, home in zip(roots, models, homes, strict=True)
            ]
            for kind, contents in ordinary_pictures().items():
                for service in services:  # warm
                    measure(service, [as_request(content) for content in contents], 4, seconds=1)
                rows += checkout_rows(kind, services, contents)
        finally:
            os.sched_setaffinity(0, before)
    return rows


def smoke_model(root: Path, folder: Path) -> Path:
    "A model that the code of a checkout has trained, for seconds, in a copy."
    copy_project(root, folder)
    env = os.environ | {"PYTHONPATH": str(folder), "CELESTIAL_HOME": str(folder / ".celestial")}
    done = subprocess.run([CELESTIAL, "run", "smoke", "--json"], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the smoke run failed:\n{done.stderr[-3000:]}")
    return folder / "output/smoke"


def against(what: str, here: str, there: str, ratio: float) -> Row:
    "A row beside the peer's."
    return (
        f"/predict, {what}",
        here,
        f"BentoML with Keras {there}",
        f"{ratio:.1f} ×" if ratio > 1 else f"1/{1 / ratio:.1f}",
    )


def publish(model: Path, home: Path, version: int) -> dict[str, str]:
    "A published version that calls its classes by other names, so that its answers tell who gave them; new names by old."
    about, folder = read_json(model / "model.json"), home / f"models/bench/{version}"
    folder.mkdir(parents=True)
    for name in ("model.onnx", *about.get("files", {})):
        shutil.copy2(model / name, folder / name)
    names = {old: f"{old} {version}" for old in about["classes"]}
    write_json(folder / "model.json", about | {"version": str(version), "classes": list(names.values())})
    return names


def swap_row(model: Path, home: Path, contents: list[bytes], count: int) -> Row:
    "Requests under load while the champion changes every ten seconds; each answer is compared with its model's own."
    versions = [publish(model, home, version) for version in (1, 2)]
    predictor, wrong, seen = Predictor(model), Counter(), Counter()
    expected = [predictor.predict(content).label for content in contents]

    def check(i: int, status: int, body: bytes) -> None:
        answer = json.loads(body)
        version = answer.get("model_version", "")
        seen[version] += 1
        wrong["failed"] += status != 200
        wrong["misnamed"] += status == 200 and answer["label"] != versions[int(version) - 1][expected[i]]

    over = threading.Event()
    write_json(home / "models/champion.json", {"model": "bench/1"})
    swapper = threading.Thread(target=swap, args=(home, over))
    with ours(None, home) as service:
        swapper.start()
        requests = [as_request(content) for content in contents]
        tally = load(service.port, requests, 16, count=count, on_answer=check)
        over.set()
        swapper.join()
    if len(seen) < 2:
        sys.exit("the champion never changed; was the load too short?")
    return (
        f"{count:,} requests, a swap every 10 s",
        f"{wrong['failed'] + tally.broken} failed",
        f"{wrong['misnamed']} answered by another model than they name",
        " + ".join(f"{n:,}" for n in seen.values()),
    )


def swap(home: Path, over: threading.Event, seconds: float = 10) -> None:
    "Make the other version champion, again and again."
    turn = 1
    while not over.wait(seconds):
        turn = 3 - turn
        write_json(home / "models/champion.json", {"model": f"bench/{turn}"})
