"The service under load, beside the guide's own way of serving the same model: the same pictures, the same core."

from __future__ import annotations

import io
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
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np
import pandas as pd
from PIL import Image

from bench import ABSENT, CELESTIAL, PEER, Row, Text, environment, in_turn, wall
from bench.load import Tally, as_request, encoded, load
from bench.sweep import copy_project
from celestial_ml.core.files import project_root, read_json, write_json
from celestial_ml.data.images import decode_image
from celestial_ml.planets.bodies import BODIES
from celestial_ml.planets.renderer import render
from celestial_ml.serve.predictor import Predictor

SERVER_CORE, CLIENT_CORE = 0, 1


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


def peers(
    model: Path, home: Path, pictures: list[bytes]
) -> dict[str, tuple[list[str], str, dict[str, str], list[bytes]]]:
    "Other ways to serve the run's Keras model, by name: the command, the path that answers when it's ready, settings, requests."
    if (python := environment("keras")) is None:
        return {}
    about = {
        "PEER_MODEL": str(model / "model.keras"),
        "PEER_CLASSES": ",".join(read_json(model / "model.json")["classes"]),
    }
    about |= {"TF_CPP_MIN_LOG_LEVEL": "3", "NO_PROXY": "127.0.0.1", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    bin, served = python.parent, home / "mlflow"
    wall([python, PEER / "mlflow_model.py", about["PEER_MODEL"], served], **about)
    side = np.load(model / "pixels.npy", mmap_mode="r").shape[1]
    pixels = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB").resize((side, side))) for one in pictures]
    bento = about | {"PEER_FOLDER": str(PEER), "BENTOML_DO_NOT_TRACK": "True"}
    mlflow = [f"{bin}/mlflow", "models", "serve", "-m", str(served), "--env-manager", "local"]
    files = [as_request(one, kind="image/jpeg") for one in pictures]
    return {
        "BentoML": ([f"{bin}/bentoml", "serve", "service:CelestialBodiesClassifier"], "/readyz", bento, files),
        "FastAPI": ([str(python), str(PEER / "fastapi_service.py")], "/health", about, files),
        "mlflow models serve": (mlflow, "/ping", about, [as_json(one) for one in pixels]),
    }


def as_json(pixels: np.ndarray) -> bytes:
    "A whole request with pixels, as MLflow's scoring server takes them."
    body = json.dumps({"instances": [pixels.tolist()]}).encode()
    lines = "POST /invocations HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    return f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


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
        sys.exit(f"{service.process.args}: {tally.broken} broken connections, {dict(tally.statuses)}")
    return tally


def serving_rows(model: Path, swaps: int, times: int, quick: bool) -> list[Row | Text]:
    "All rows about the service."
    paths = [Path(path).resolve() for path in pd.read_parquet(model / "predictions.parquet").path][:200]
    contents = [path.read_bytes() for path in paths]
    requests, before = [as_request(content) for content in contents], os.sched_getaffinity(0)
    on_core(CLIENT_CORE)
    rows: list[Row | Text] = []
    try:
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            rows += beside_peers(model, home, paths, requests, times, quick)
            rows.append(log_row(model, home / "logs", requests, 2 * times))
            with ours(model, home / "a", log_url="off") as without, ours(model, home / "b") as kept:
                rows += protocol_rows(kept, read_json(model / "model.json")["name"], contents, 2 * times)
                rows += processes_row(without, model, home, requests, times)
            rows += [swap_row(model, home / "swaps", contents, swaps)] if swaps and not quick else []
    finally:
        os.sched_setaffinity(0, before)
    return rows


def beside_peers(
    model: Path, home: Path, paths: list[Path], requests: list[bytes], times: int, quick: bool
) -> list[Row]:
    "One worker on one core, beside the peers on the same core, turn by turn, and what it costs to have it there."
    others, seconds = peers(model, home, [path.read_bytes() for path in paths]), 1 if quick else 3
    rows: list[Row] = []
    asked = {"ours": requests} | {name: other[3] for name, other in others.items()}
    with ExitStack() as stack:
        services = {"ours": stack.enter_context(ours(model, home))}
        for name, (command, ready, env, _) in others.items():
            services[name] = stack.enter_context(serving(command, ready, **env))
        for name, service in services.items():  # warm
            measure(service, asked[name], 1, seconds=2)

        for clients in (8,) if quick else (1, 8, 64):
            ways: dict[str, Callable[[], Any]] = {
                name: partial(measure, one, asked[name], clients, seconds=seconds) for name, one in services.items()
            }
            if clients > 1:
                ways["limit"] = partial(limit, model, paths)
            figures = in_turn(times, **ways)
            rows += load_rows(clients, limits=figures.pop("limit", []), tallies=figures)
        starts = {name: service.start for name, service in services.items()}
        memory = {name: resident_mb(service.process.pid) for name, service in services.items()}
    with ours(model, home, "--demo") as service:
        demo = service.start, resident_mb(service.process.pid)
    for what, unit, values, with_demo in (
        ("start until ready", "s", starts, demo[0]),
        ("memory", "MB", memory, demo[1]),
    ):
        beside = {name: [values[name]] for name in others}
        rows.append(Row(what, unit, [values["ours"]], beside, goal=1.0))
        rows.append(Row(f"{what}, with the demo", unit, [with_demo], beside, goal=1.0))
    return rows


WHY = (
    "The loop has no HTTP. In a profile of the service on one core, 35 % of a picture's time is the event loop's: sending the answer "
    "(5 %), the access log (5 %), the form (4 %), the rest of the protocol; the scorer measures image statistics for drift (3 %)."
)


def load_rows(clients: int, tallies: dict[str, list[Tally]], limits: list[float]) -> list[Row]:
    "Throughput, p50 and p99 of so many clients."
    figures: dict[str, tuple[str, Callable[[Tally], float]]] = {
        "answers": ("/s", lambda tally: tally.rate),
        "p50": ("ms", lambda tally: tally.percentile(50)),
        "p99": ("ms", lambda tally: tally.percentile(99)),
    }
    rows = []
    for what, (unit, figure) in figures.items():
        values = {name: [figure(tally) for tally in some] for name, some in tallies.items()}
        own = values.pop("ours")
        most = {"decoding and inference in a loop": limits} if limits and unit == "/s" else {}
        share = 0.8 if most else None
        who = f"{clients} client{'s' if clients > 1 else ''}"
        rows.append(Row(f"/predict, {who}: {what}", unit, own, values, most, 1.0, share, WHY))
    return rows


def log_row(model: Path, home: Path, requests: list[bytes], times: int) -> Row:
    "What the prediction log costs; each turn starts a process, since two of the same kind differ by up to a twentieth."

    def rate(**settings: str) -> float:
        with ours(model, home, **settings) as service:
            measure(service, requests, 16, seconds=1)  # warm
            return measure(service, requests, 16, seconds=2).rate

    rates = in_turn(times, kept=rate, off=lambda: rate(log_url="off"))
    return Row("/predict, with its log", "/s", rates["kept"], {}, {"without one": rates["off"]}, limit_goal=0.95)


def processes_row(one: Serving, model: Path, home: Path, requests: list[bytes], times: int) -> list[Row]:
    "Two processes on two cores beside one on one; each shares its core with its own clients, as there is no third."
    if (os.cpu_count() or 1) < 2:
        ABSENT["two processes"] = "the machine has one core"
        return []
    environment = {"CELESTIAL_HOME": str(home / "second"), "CELESTIAL_LOG_URL": "off"}
    second = Serving(
        [CELESTIAL, "serve", "--model", str(model), "--no-demo"], "/ready", lambda: on_core(CLIENT_CORE), **environment
    )
    places = ((one.port, SERVER_CORE), (second.port, CLIENT_CORE))
    try:
        with ProcessPoolExecutor(2) as pool:

            def rate(count: int) -> float:
                tasks = [pool.submit(pinned, core, port, requests) for port, core in places[:count]]
                return sum(task.result() for task in tasks)

            rate(2)  # warm
            rates = in_turn(times, two=lambda: rate(2), one=lambda: rate(1))
    finally:
        second.end()
    return [Row("/predict, two processes on two cores", "/s", rates["two"], {"one on one": rates["one"]}, goal=1.8)]


def pinned(core: int, port: int, requests: list[bytes]) -> float:
    "Answers a second for clients on a core."
    on_core(core)
    return load(port, requests, 16, seconds=2).rate


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


def protocol_rows(service: Serving, name: str, contents: list[bytes], times: int) -> list[Row]:
    "The Open Inference Protocol beside /predict, turn by turn: the same pictures as files, and their pixels."
    pixels = [decode_image(content) for content in contents]
    ways = {
        "/predict": [as_request(content) for content in contents],
        "files": [as_tensors(name, [content], "BYTES", (1,)) for content in contents],
        "pixels": [as_tensors(name, [one.tobytes()], "UINT8", (1, *one.shape)) for one in pixels],
    }
    tallies = in_turn(times, **{way: partial(measure, service, ways[way], 16, seconds=1.5) for way in ways})
    rates = {way: [tally.rate for tally in some] for way, some in tallies.items()}
    return [
        Row(f"Open Inference Protocol, {way} in binary", "/s", rates[way], {"/predict": rates["/predict"]}, goal=goal)
        for way, goal in (("files", 0.9), ("pixels", None))
    ]


def ordinary_pictures() -> dict[str, list[bytes]]:
    "Files as people send them."
    sizes = {"128 px JPEG": (128, "JPEG"), "512 px PNG": (512, "PNG"), "1 megapixel JPEG": (1000, "JPEG")}
    return {name: [encoded(render(body, size=size), kind) for body in BODIES] for name, (size, kind) in sizes.items()}


TURNS = 6
ALLOWED = 0.95  # at least so many times as good as another checkout


def checkout_rows(kind: str, services: list[Serving], contents: list[bytes]) -> list[Row]:
    "Throughput and p50 of one kind of picture, turn by turn: this checkout's, and the other's."
    requests, rows = [as_request(content) for content in contents], list[Row]()
    for what, unit, clients, seconds, figure in (
        ("throughput", "/s", 16, 2, lambda tally: tally.rate),
        ("p50", "ms", 1, 1, lambda tally: tally.percentile(50)),
    ):
        ways = {str(one.port): partial(measure, one, requests, clients, seconds=seconds) for one in services}
        values = [[figure(tally) for tally in tallies] for tallies in in_turn(TURNS, **ways).values()]
        rows.append(Row(f"/predict, {kind}, {what}", unit, values[0], {"the other": values[1]}, goal=ALLOWED))
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


def publish(model: Path, home: Path, version: int) -> dict[str, str]:
    "A published version that calls its classes by other names, so that its answers tell who gave them; new names by old."
    about, folder = read_json(model / "model.json"), home / f"models/bench/{version}"
    folder.mkdir(parents=True)
    for name in ("model.onnx", *about.get("files", {})):
        shutil.copy2(model / name, folder / name)
    names = {old: f"{old} {version}" for old in about["classes"]}
    write_json(folder / "model.json", about | {"version": str(version), "classes": list(names.values())})
    return names


def swap_row(model: Path, home: Path, contents: list[bytes], count: int) -> Text:
    "Requests under load while the champion changes every ten seconds; each answer is compared with its model's own."
    versions = [publish(model, home, version) for version in (1, 2)]
    predictor, wrong, seen = Predictor(model), Counter(), Counter()
    expected = [predictor.predict(content).label for content in contents]

    def check(i: int, status: int, body: bytes) -> None:
        answer = json.loads(body)
        version = answer.get("model_version", "")
        seen[version] += 1
        wrong["failed"] += status != 200
        wrong["misnamed"] += (
            status == 200 and answer["label"] != versions[int(version.rpartition("/")[2]) - 1][expected[i]]
        )

    over = threading.Event()
    write_json(home / "models/champion.json", {"model": "bench/1"})
    swapper = threading.Thread(target=swap, args=(home, over), daemon=True)  # it ends with a failure, too
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
        " + ".join(f"{n:,}" for n in seen.values()) + (" MISSED" if sum(wrong.values()) + tally.broken else ""),
    )


def swap(home: Path, over: threading.Event, seconds: float = 10) -> None:
    "Make the other version champion, again and again."
    turn = 1
    while not over.wait(seconds):
        turn = 3 - turn
        write_json(home / "models/champion.json", {"model": f"bench/{turn}"})
