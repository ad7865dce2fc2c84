"""The service with its demo under mixed attack: what healthy clients wait, what it takes, whether it stays up.

Run as `python -m bench soak [--minutes 20] [--seed N]`; the exit code is 1 where a figure is missed. A healthy client
that hears 503 or 429 does what `Retry-After` says, and its wait goes on. Clients come from many loopback addresses,
which Linux has; the attackers' processes are `nice`, since elsewhere they would have a machine of their own.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench import CELESTIAL, Row
from bench.attacks import ATTACKS, LONG, WAITING, Address, draw_pictures, file_data, noise_jpeg, plain
from bench.serving import Serving, smoke_model, tree
from celestial_ml.core.files import project_root, write_json
from celestial_ml.serve.settings import password_hash

GIVEN_UP = 30.0  # seconds after which a healthy client goes
DESCRIPTORS = 1024  # the soft limit that most systems start a process with
SPARE = 16  # descriptors more than at the start that are no leak
SETTLED = 20  # seconds after the last attack
PASSWORD = "correct horse"


# ----------------------------------------------------------------------------------------------------- healthy clients


@dataclass(frozen=True)
class Wait:
    "What a healthy client went through for one answer."

    kind: str
    began: float  # by the monotonic clock, which is the whole machine's
    seconds: float  # until the answer was 200; `GIVEN_UP` where it never was
    status: int | str  # of the first answer


class Visitor:
    "A healthy client: one kind of request, at a steady rate."

    def __init__(self, kind: str, every: float, visit: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]):
        self.kind, self.every, self.visit = kind, every, visit

    async def run(self, client: httpx.AsyncClient, address: Address, until: float, waits: list[Wait]) -> None:
        "Until the end."
        while (began := time.monotonic()) < until and address.is_alive:
            waits.append(await self.wait(client))
            await asyncio.sleep(max(0, began + self.every - time.monotonic()))

    async def wait(self, client: httpx.AsyncClient) -> Wait:
        "Ask until there is an answer."
        began, first, seconds = time.monotonic(), "", GIVEN_UP
        while time.monotonic() < began + GIVEN_UP:
            try:
                answer = await self.visit(client)
            except httpx.HTTPError as e:
                first, pause = first or type(e).__name__, 1.0
            else:
                first, pause = first or str(answer.status_code), float(answer.headers.get("retry-after", GIVEN_UP))
                if answer.status_code == 200:
                    seconds = time.monotonic() - began
                    break
                if answer.status_code not in (429, 503):
                    break
            await asyncio.sleep(pause)
        return Wait(self.kind, began, seconds, int(first) if first.isdecimal() else first)


def post(content: bytes, **headers: str) -> Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]:
    "A picture to /predict."
    return lambda client: client.post("/predict", files={"image": content}, headers=headers)


class NoAnswer(httpx.HTTPError):
    "The page says that it has none: it was busy, mostly."


async def visit_demo(client: httpx.AsyncClient, content: bytes, function: int) -> httpx.Response:
    "What a browser does when a picture is dropped."
    taken = await client.post("/gradio_api/upload", files={"files": ("a.jpg", content)})
    if taken.status_code != 200:
        return taken
    data = [file_data(taken.json()[0]), time.time(), None]
    said = {"data": data, "fn_index": function, "session_hash": f"healthy-{time.time()}"}
    answer = await client.post("/gradio_api/run/predict", json=said)
    if answer.status_code == 200 and "Answered by model" not in answer.text:
        raise NoAnswer("the page has words, and no answer")
    return answer


def visitors(function: int) -> list[Visitor]:
    "Ordinary pictures, the demo's page, a picture on it."
    planet, photo, large = noise_jpeg(128, 128), noise_jpeg(1200, 900), noise_jpeg(4000, 3000)
    page, health = (partial(lambda path, client: client.get(path), path) for path in ("/", "/health"))
    return [
        Visitor("/predict, 128 px", 0.25, post(planet)),
        Visitor("/predict, new connection", 1, post(planet, connection="close")),
        Visitor("/predict, 1 megapixel", 1, post(photo)),
        Visitor(LARGE, 5, post(large)),
        Visitor("/health", 1, health),
        Visitor("demo, its page", 5, page),
        Visitor("demo, a picture", 2, partial(visit_demo, content=planet, function=function)),
    ]


LARGE = "/predict, 12 megapixels"  # reported, and judged by nothing: one thread decodes what is large


async def log_in(client: httpx.AsyncClient, login: bool) -> None:
    "Where the demo asks for it."
    if login:
        (await client.post("/login", data={"username": "ann", "password": PASSWORD})).raise_for_status()


async def _stay_healthy(address: Address, until: float, login: bool) -> list[Wait]:
    waits: list[Wait] = []
    transports = [httpx.AsyncHTTPTransport(local_address=f"127.0.0.{2 + i}") for i in range(7)]
    url = f"http://127.0.0.1:{address.port}"
    clients = [httpx.AsyncClient(base_url=url, timeout=GIVEN_UP, transport=one) for one in transports]
    await asyncio.gather(*(log_in(client, login) for client in clients))
    people = visitors(address.functions["drop"])
    await asyncio.gather(*(one.run(client, address, until, waits) for one, client in zip(people, clients, strict=True)))
    return waits


def stay_healthy(address: Address, until: float, login: bool = False) -> list[Wait]:
    "Be all healthy clients, until a time of the monotonic clock; in a process of its own, which has little to do."
    return asyncio.run(_stay_healthy(address, until, login))


# ------------------------------------------------------------------------------------------------------------ attackers


@dataclass(frozen=True)
class Attack:
    "One attack and what came of it."

    kind: str
    began: float
    ended: float
    answers: dict[str, int]
    failures: list[str]  # status and the beginning of the body


async def _attack_one(kind: str, address: Address, rng: random.Random) -> Attack:
    began = time.monotonic()
    try:
        async with asyncio.timeout(2 * LONG):
            answers = await ATTACKS[kind](address, rng)
    except (TimeoutError, OSError):
        answers = []
    bad = [f"{one.status} {one.body[:200].decode('latin-1')}" for one in answers if one.is_failure]
    return Attack(kind, began, time.monotonic(), dict(Counter(one.name for one in answers)), bad)


async def _attack(address: Address, until: float, seed: int, at_once: int) -> list[Attack]:
    done: list[Attack] = []

    async def worker(kinds: list[str], seed: str) -> None:
        "One attack after the other, each kind as often."
        rng, left = random.Random(seed), list[str]()
        while time.monotonic() < until and address.is_alive:
            left = left or rng.sample(kinds, len(kinds))
            done.append(await _attack_one(left.pop(), address, rng))
            await asyncio.sleep(0.2)

    waiting, working = sorted(WAITING), sorted(set(ATTACKS) - WAITING)
    # Each has its share of the kinds, so that all have had their turn as soon as can be.
    shares = [part for i in range(at_once) for part in (waiting[i::at_once], working[i::at_once])]
    await asyncio.gather(*(worker(share, f"{seed} {i}") for i, share in enumerate(shares)))
    return done


def attack(address: Address, until: float, seed: int, at_once: int) -> list[Attack]:
    "Be all attackers, until a time of the monotonic clock, and the half minute that what was begun still takes."
    os.nice(10)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return asyncio.run(_attack(address, until, seed, at_once))


# ----------------------------------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Sample:
    "What the service takes at a moment."

    at: float
    memory: float  # MB resident; of processes below it, their share
    below: float  # of these, MB of the processes below it
    descriptors: int
    uploads: float  # MB in the demo's folder
    processes: int
    load: float  # of the machine, over a minute; far above 2 × its cores, others slow it down


def _kilobytes(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name)), 0)


def sample(pid: int, uploads: Path) -> Sample | None:
    "Look at the service; None where it has gone."
    try:
        first, *below = tree(pid)
        memory, shares = _kilobytes(Path(f"/proc/{first}/status"), "VmRSS:"), 0
        descriptors = len(os.listdir(f"/proc/{first}/fd"))  # noqa: PTH208
    except (OSError, IndexError):
        return None
    for one in below:
        try:
            shares += _kilobytes(Path(f"/proc/{one}/smaps_rollup"), "Pss:")
            descriptors += len(os.listdir(f"/proc/{one}/fd"))  # noqa: PTH208
        except OSError:  # it has ended meanwhile
            continue
    kept = 0
    for file in uploads.rglob("*"):
        with suppress(OSError):  # it is deleted while we look
            kept += file.stat().st_size
    return (
        Sample(
            time.monotonic(),
            (memory + shares) / 1000,
            shares / 1000,
            descriptors,
            kept / 1e6,
            1 + len(below),
            os.getloadavg()[0],
        )
        if memory
        else None
    )


@contextmanager
def hostage(root: Path, model: Path, folder: Path, log: Path, login: bool, gigabytes: float) -> Iterator[Serving]:
    "`celestial serve` with the demo, as anybody starts it, with the limits of an ordinary machine."
    (folder / "uploads").mkdir()
    env = {"PYTHONPATH": str(root), "CELESTIAL_HOME": str(folder / "home")}
    env |= {"GRADIO_TEMP_DIR": str(folder / "uploads"), "TMPDIR": str(folder / "uploads")}
    env |= {"CELESTIAL_SERVE_DEMO_LOGIN": f"ann:{password_hash(PASSWORD)}"} if login else {}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 1e9),) * 2)  # a failure doesn't take the machine along

    with log.open("w") as output:
        service = Serving([CELESTIAL, "serve", "--model", str(model)], "/ready", limit, output, **env)
        try:
            yield service
        finally:
            service.end()


def learn_page(port: int, login: bool) -> dict[str, int]:
    "What the parts of the demo's page call."
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=GIVEN_UP) as client:
        if login:
            client.post("/login", data={"username": "ann", "password": PASSWORD}).raise_for_status()
        config = client.get("/config").json()
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    calls = {
        names.get(target): one["id"]
        for one in config["dependencies"]
        for target, event in one["targets"]
        if event == "upload"
    }
    return calls | {"compare-show": calls["compare-drop"] + 1}


# ------------------------------------------------------------------------------------------------------------- the soak


@dataclass
class Soak:
    "All that was seen."

    began: float
    waits: list[Wait]
    attacks: list[Attack]
    samples: list[Sample]
    survived: bool

    def milliseconds(self, *kinds: str) -> np.ndarray:
        "What healthy clients waited; of all judged kinds where none is named."
        kept = [one for one in self.waits if one.kind in kinds or (not kinds and one.kind != LARGE)]
        return 1000 * np.array([one.seconds for one in kept] or [np.nan])

    @property
    def failures(self) -> Counter[str]:
        "5xx but 503 with Retry-After, and files of the server, by kind."
        bad = Counter(f"{one.kind}: {failure}" for one in self.attacks for failure in one.failures)
        healthy = [one for one in self.waits if isinstance(one.status, int) and one.status >= 500 and one.status != 503]
        return bad + Counter(f"healthy {one.kind}: {one.status}" for one in healthy)

    def figures(self) -> dict[str, tuple[float, float]]:  # what was measured, and the most that is allowed
        "What the service must keep to."
        memory, descriptors = ([getattr(one, name) for one in self.samples] for name in ("memory", "descriptors"))
        return {
            "5xx but 503 with Retry-After, and leaked files": (sum(self.failures.values()), 0),
            "healthy clients' wait, p99, ms": (float(np.percentile(self.milliseconds(), 99)), 1000),
            "memory, peak, MB": (max(memory), 500),
            "descriptors, end less start": (descriptors[-1] - descriptors[0], SPARE),
            "the service has gone": (0 if self.survived else 1, 0),
        }

    def worst(self, count: int = 12) -> list[dict[str, Any]]:
        "The longest waits, with what was attacked meanwhile."
        slowest = sorted((one for one in self.waits if one.kind != LARGE), key=lambda one: -one.seconds)[:count]
        return [
            asdict(one)
            | {"began": one.began - self.began}
            | {"meanwhile": [a.kind for a in self.attacks if a.began < one.began + one.seconds and a.ended > one.began]}
            for one in slowest
        ]

    def by_kind(self) -> dict[str, dict[str, Any]]:
        "What came of each kind of attack."
        kinds: dict[str, dict[str, Any]] = defaultdict(lambda: {"attacks": 0, "seconds": 0.0, "answers": Counter()})
        for one in self.attacks:
            entry = kinds[one.kind]
            entry["attacks"] += 1
            entry["seconds"] = max(entry["seconds"], one.ended - one.began)
            entry["answers"] += Counter(one.answers)
        return dict(sorted(kinds.items()))

    def to_dict(self) -> dict[str, Any]:
        "For a file."
        healthy: dict[str, Any] = {}
        for kind in dict.fromkeys(one.kind for one in self.waits):
            p50, p99, most = np.percentile(self.milliseconds(kind), [50, 99, 100])
            first = Counter(str(one.status) for one in self.waits if one.kind == kind)
            healthy[kind] = {"p50_ms": p50, "p99_ms": p99, "max_ms": most, "first_answers": first}
        return {
            "figures": {name: {"value": value, "limit": limit} for name, (value, limit) in self.figures().items()},
            "failures": self.failures,
            "healthy": healthy,
            "worst": self.worst(),
            "attacks": self.by_kind(),
            "samples": [asdict(one) | {"at": one.at - self.began} for one in self.samples],
        }

    def rows(self) -> list[Row]:
        "As the other sections print it."
        first, last = self.samples[0], self.samples[-1]
        rows: list[Row] = [
            (name, f"{value:.0f}", f"at most {limit:.0f}", "kept" if value <= limit else "MISSED")
            for name, (value, limit) in self.figures().items()
        ]
        for kind, about in self.to_dict()["healthy"].items():
            answers = ", ".join(f"{status}: {n}" for status, n in about["first_answers"].items())
            rows.append((f"  {kind}", f"p50 {about['p50_ms']:.0f} ms", f"p99 {about['p99_ms']:.0f} ms", answers))
        for name, unit in (
            ("memory", " MB"),
            ("below", " MB"),
            ("descriptors", ""),
            ("uploads", " MB"),
            ("processes", ""),
            ("load", ""),
        ):
            most = max(getattr(one, name) for one in self.samples)
            ends = f"start {getattr(first, name):.0f}{unit}", f"end {getattr(last, name):.0f}{unit}"
            rows.append((f"  {name}", f"peak {most:.0f}{unit}", *ends))
        for kind, about in self.by_kind().items():
            answers = ", ".join(f"{status}: {n}" for status, n in about["answers"].most_common(6))
            rows.append((f"  {kind}", f"{about['attacks']} attacks", f"longest {about['seconds']:.0f} s", answers))
        rows += [("  FAILED", f"{n} times", "", what[:160]) for what, n in self.failures.most_common(20)]
        return rows

    def plot(self, path: Path) -> None:
        "Memory, descriptors and waits over time."
        import matplotlib.pyplot as plt

        figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(11, 8), layout="constrained")
        at = [one.at - self.began for one in self.samples]
        top.plot(at, [one.memory for one in self.samples])
        middle.plot(at, [one.descriptors for one in self.samples])
        bottom.semilogy([w.began - self.began for w in self.waits], [1000 * w.seconds for w in self.waits], ".", ms=3)
        for axis, label, most in ((top, "resident MB", 500), (middle, "descriptors", None), (bottom, "wait, ms", 1000)):
            axis.set_ylabel(label)
            if most:
                axis.axhline(most, color="tab:red", lw=0.8)
        bottom.set_xlabel("seconds")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def watch(service: Serving, uploads: Path, running: list[Future[Any]]) -> list[Sample]:
    "Look every second, until the clients have ended and what they left has had time to go."
    samples, settled = [], 0
    while settled < SETTLED and (one := sample(service.process.pid, uploads)) and service.process.poll() is None:
        samples.append(one)
        settled += all(future.done() for future in running)
        time.sleep(1)
    return samples


def soak(
    model: Path,
    minutes: float = 20,
    seed: int = 0,
    root: Path | None = None,  # whose code is served; this checkout's if none is named
    log: Path = Path(os.devnull),  # of the service
    login: bool = False,  # whether the demo asks for one
    at_once: int = 3,  # attacks that work, and as many that wait
    gigabytes: float = 8,  # of addresses that the service may take
) -> Soak:
    "Attack a service for some minutes."
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        folder = Path(name)
        (folder / "pictures").mkdir()
        pool.submit(draw_pictures, folder / "pictures").result()
        secret = folder / "secret.jpg"
        secret.write_bytes(plain(64, 64, "JPEG"))
        with hostage(root or project_root(), model.resolve(), folder, log, login, gigabytes) as service:
            address = Address(
                service.port, folder / "pictures", learn_page(service.port, login), str(secret), service.process.pid
            )
            pool.submit(stay_healthy, address, time.monotonic() + 2, login).result()  # warm
            began = time.monotonic()
            until = began + 60 * minutes
            start = sample(service.process.pid, folder / "uploads")
            healthy = pool.submit(stay_healthy, address, until, login)
            hostile = pool.submit(attack, address, until, seed, at_once)
            samples = watch(service, folder / "uploads", [healthy, hostile])
            survived = service.process.poll() is None and _is_well(service.port)
            return Soak(began, healthy.result(), hostile.result(), [s for s in (start, *samples) if s], survived)


def _is_well(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def soak_rows(model: Path | None, minutes: float, seed: int, root: Path | None, login: bool) -> list[Row]:
    "The rows of a soak; its details in output/bench."
    output = Path("output/bench")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = model or smoke_model((root or project_root()).resolve(), Path(folder))
        seen = soak(model, minutes, seed, root, output / "soak.log", login)
    write_json(output / "soak.json", seen.to_dict())
    seen.plot(output / "soak.png")
    return [*seen.rows(), ("details", f"{output}/soak.json", f"{output}/soak.png", f"{output}/soak.log")]
