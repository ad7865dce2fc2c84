"Clients for load: keep-alive connections that post one prepared request after another, and note every answer."

from __future__ import annotations

import asyncio
import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    "A picture as a file."
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def as_request(
    content: bytes,  # of an image file
    path: str = "/predict",
    field: str = "image",
    headers: str = "",
    kind: str = "application/octet-stream",  # what the form says that it is
    name: str = "a",  # of the file
) -> bytes:
    "A whole HTTP request with a picture in a form."
    head = f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\nContent-Type: {kind}\r\n\r\n'
    body = head.encode() + content + b"\r\n--b--\r\n"
    lines = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: multipart/form-data; boundary=b\r\n{headers}"
    return f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass
class Tally:
    "What came back."

    seconds: list[float] = field(default_factory=list)  # of each answered request
    statuses: Counter = field(default_factory=Counter)
    broken: int = 0  # connections that ended without an answer
    took: float = 0  # seconds, all of it

    @property
    def rate(self) -> float:
        "Answers a second."
        return len(self.seconds) / self.took

    def percentile(self, q: float) -> float:
        "Milliseconds."
        return 1000 * float(np.percentile(self.seconds, q))


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    "Status and body of one answer."
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    at = lower.index(b"\r\ncontent-length:") + 17
    return int(head[9:12]), await reader.readexactly(int(lower[at : lower.index(b"\r", at)]))


async def client(
    port: int,
    requests: Sequence[bytes],
    first: int,  # of the requests
    until: Callable[[], bool],  # whether to stop
    tally: Tally,
    on_answer: Callable[[int, int, bytes], None] | None,
    interval: float,  # seconds between two requests of this client; 0: at once
    late: float,  # seconds behind the first client, so that they don't march in step
) -> None:
    "One connection, one request at a time."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    i, due = first, time.perf_counter() + late
    while not until():
        if interval:
            due += interval
            await asyncio.sleep(max(0, due - time.perf_counter()))
        began = time.perf_counter()
        try:
            writer.write(requests[i % len(requests)])
            status, body = await read_answer(reader)
        except (OSError, asyncio.IncompleteReadError):
            tally.broken += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        tally.seconds.append(time.perf_counter() - began)
        tally.statuses[status] += 1
        if on_answer:
            on_answer(i % len(requests), status, body)
        i += 1
    writer.close()


async def _load(port, requests, clients, seconds, count, rate, on_answer) -> Tally:
    tally, began = Tally(), time.perf_counter()

    def over() -> bool:
        if count:
            return len(tally.seconds) >= count
        return time.perf_counter() - began > seconds

    interval = clients / rate if rate else 0
    await asyncio.gather(
        *(
            client(port, requests, 7 * i, over, tally, on_answer, interval, i * interval / clients)
            for i in range(clients)
        )
    )
    tally.took = time.perf_counter() - began
    return tally


def load(
    port: int,
    requests: Sequence[bytes],  # of `as_request`
    clients: int,
    seconds: float = 5,
    count: int = 0,  # requests; 0: for so many seconds
    rate: float = 0,  # requests a second, of all clients; 0: as many as there is an answer to
    on_answer: Callable[[int, int, bytes], None] | None = None,  # takes the request's place, the status, the body
) -> Tally:
    "Put a server under load."
    try:
        import uvloop

        run = uvloop.run
    except ImportError:  # Windows
        run = asyncio.run
    return run(_load(port, requests, clients, seconds, count, rate, on_answer))
