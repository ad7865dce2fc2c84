"""What a stranger may send: one small function a kind, each bounded in time, count and bytes.

Each takes where to send it and a random generator, and returns what came back: a status, or `closed`, or `silence`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from bench.load import as_request, encoded

SHORT, LONG = 12, 40  # seconds that an attack waits for an answer, and that a slow one goes on


@dataclass(frozen=True)
class Answer:
    "What came back."

    status: int | str  # of the answer; or `closed`, `silence`, `held`, `leak`
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def name(self) -> str:
        "The status, with the code of our own errors."
        try:
            return f"{self.status} {json.loads(self.body)['error']['code']}"
        except (ValueError, KeyError, TypeError):
            return str(self.status)

    @property
    def is_failure(self) -> bool:
        "A file of the server, or a 5xx but a 503 that says when to come back."
        if self.status == "leak":
            return True
        return isinstance(self.status, int) and self.status >= 500 and not self.is_later

    @property
    def is_later(self) -> bool:
        "A 503 that says when to come back."
        return self.status == 503 and "retry-after" in self.headers


@dataclass(frozen=True)
class Address:
    "Where the service listens, what is known of it, and from which of this machine's addresses to come."

    port: int
    folder: Path  # of the pictures that `draw_pictures` drew
    functions: dict[str, int]  # of the demo: what the part of the page with this id calls
    secret: str  # path of a picture on the server that no client may read
    pid: int  # of the service
    source: str = "127.0.0.1"

    @property
    def is_alive(self) -> bool:
        "Whether there is somebody to ask."
        return Path(f"/proc/{self.pid}").exists()

    def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
        "A whole request."
        head = f"{method} {path} HTTP/1.1\r\nHost: here\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def json(self, path: str, value: object) -> bytes:
        "A whole request with JSON, or with bytes that are sent as JSON."
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.request("POST", path, body, "Content-Type: application/json\r\n")


def elsewhere(address: Address, rng: random.Random) -> Address:
    "The same, from another address."
    return replace(address, source=f"127.{rng.randint(1, 9)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}")


async def open_connection(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    "Connect."
    return await asyncio.open_connection("127.0.0.1", address.port, local_addr=(address.source, 0))


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    "The head of an answer, and its body where its length is told."
    head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(head.split()[1]), headers, body)


Parts = Iterable[bytes] | AsyncIterator[bytes]


async def send_parts(writer: asyncio.StreamWriter, parts: Parts) -> None:
    "One after the other, as fast as they are taken."
    try:
        if isinstance(parts, AsyncIterator):
            async for part in parts:
                writer.write(part)
                await writer.drain()
        else:
            for part in parts:
                writer.write(part)
                await writer.drain()
    except OSError:
        pass  # the server has heard enough; its answer may still be there to read


async def ask(address: Address, parts: bytes | Parts, seconds: float = SHORT) -> Answer:
    "Send, and meanwhile wait for the answer."
    writer, sending = None, None
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await open_connection(address)
            sending = asyncio.create_task(send_parts(writer, [parts] if isinstance(parts, bytes) else parts))
            return await read_answer(reader)
    except TimeoutError:
        return Answer("silence")
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError):
        return Answer("closed")
    finally:
        if sending:
            sending.cancel()
        if writer:
            writer.transport.abort()


async def hold(address: Address, request: bytes, seconds: float = LONG / 2) -> Answer:
    "Send, read nothing of the answer, and stay."
    try:
        async with asyncio.timeout(SHORT):
            reader, writer = await open_connection(address)
    except (OSError, TimeoutError):
        return Answer("closed")
    try:
        writer.write(request)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(seconds)
    except (OSError, RuntimeError):
        return Answer("closed")
    finally:
        writer.transport.abort()
    return Answer("held")


async def slowly(first: bytes, drip: bytes, seconds: float = LONG, every: float = 1) -> AsyncIterator[bytes]:
    "A beginning, then a drop at a time."
    yield first
    for _ in range(int(seconds / every)):
        await asyncio.sleep(every)
        yield drip


async def together(asked: Iterable[Awaitable[Answer]]) -> list[Answer]:
    "Several at once."
    return list(await asyncio.gather(*asked))


# ------------------------------------------------------------------------------------------------------------ pictures


def png_chunk(kind: bytes, content: bytes = b"") -> bytes:
    "A chunk of a PNG file."
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# Where each pass over an interlaced PNG begins, and its steps. Source: PNG Specification, third edition, 8.1.
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def png(width: int, height: int, channels: int = 3, before: bytes = b"", interlaced: bool = False) -> bytes:
    "A PNG file of one value, however large, drawn in little memory."
    colours = {1: 0, 3: 2, 4: 6}
    header = struct.pack(">IIBBBBB", width, height, 8, colours[channels], 0, 0, int(interlaced))
    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    sizes = [(-((x - width) // dx), -((y - height) // dy)) for x, y, dx, dy in passes]
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" + b"\x7f" * (w * channels)) for w, h in sizes for _ in range(h))
    rows += packer.flush()
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", rows) + png_chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + chunks


def plain(width: int, height: int, kind: str, mode: str = "RGB", **options: object) -> bytes:
    "A file of one colour, by Pillow."
    return encoded(Image.new(mode, (width, height), (9, 99, 199, 9)[: len(mode)]), kind, **options)


def noise_jpeg(width: int, height: int, **options: object) -> bytes:
    "As hard to decode as a photograph."
    small = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return encoded(Image.fromarray(small).resize((width, height)), "JPEG", **options)


def scans_jpeg(scans: int, side: int) -> bytes:
    "A progressive JPEG with many scans that hold nothing; libjpeg goes through all blocks for each."
    empty = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"
    return noise_jpeg(side, side, progressive=True, quality=5)[:-2] + empty * scans + b"\xff\xd9"


def exif_jpeg(tag: int) -> bytes:
    "A JPEG that lies on its side, with a number of its EXIF data that is text."
    entries = [struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0"), struct.pack("<HHI4s", tag, 2, 4, b"72\0\0")]
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(entries) + b"\0\0\0\0"
    return plain(64, 48, "JPEG", exif=b"Exif\0\0" + tiff)


PICTURES: dict[str, Callable[[], bytes]] = {
    "8 × 30,000 PNG": lambda: png(8, 30_000),
    "30,000 × 8 PNG": lambda: png(30_000, 8),
    "65,500 × 700 JPEG": lambda: plain(65_500, 700, "JPEG"),
    "8 × 6,250,000 PNG": lambda: png(8, 6_250_000),
    "16,383 × 8 WebP": lambda: plain(16_383, 8, "WEBP", lossless=True),
    "empty scans": lambda: scans_jpeg(30_000, 1000),
    "empty scans, large": lambda: scans_jpeg(10_000, 3000),
    "empty chunks": lambda: png(64, 64, before=png_chunk(b"teSt") * 1_500_000),
    "text chunks": lambda: png(64, 64, before=png_chunk(b"tEXt", b"a\0b") * 1_000_000),
    "text bomb": lambda: png(64, 64, before=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b" " * 50_000_000, 9))),
    "50 megapixels, RGBA PNG": lambda: png(7071, 7071, channels=4),
    "50 megapixels, interlaced PNG": lambda: png(7071, 7071, channels=4, interlaced=True),
    "50 megapixels, JPEG": lambda: noise_jpeg(7071, 7071, quality=60),
    "50 megapixels, CMYK JPEG": lambda: plain(7071, 7071, "JPEG", mode="CMYK"),
    "50 megapixels, progressive JPEG": lambda: plain(7071, 7071, "JPEG", progressive=True),
    "50 megapixels, lossless WebP": lambda: plain(7000, 7000, "WEBP", lossless=True, method=0, quality=0),
    "900 megapixels": lambda: png(30_000, 30_000, channels=1),
    "EXIF text": lambda: exif_jpeg(0x011A),
    "EXIF text, unit": lambda: exif_jpeg(0x0128),
    "half a JPEG": lambda: noise_jpeg(1000, 1000)[:9000],
}


def draw_pictures(folder: Path) -> None:
    "Into files; in a process that ends, since drawing takes memory."
    for i, draw in enumerate(PICTURES.values()):
        (folder / f"{i}").write_bytes(draw())


@functools.cache
def picture(folder: Path, name: str) -> bytes:
    "One of them."
    return (folder / str(list(PICTURES).index(name))).read_bytes()


async def send_picture(name: str, address: Address, rng: random.Random) -> list[Answer]:
    "To the API twice at once, and to the demo."
    content, address = picture(address.folder, name), elsewhere(address, rng)
    routes = ("/predict", rng.choice(["/predict", "/explain"]))
    return await together(
        [*(ask(address, as_request(content, path), LONG) for path in routes), drop(address, content, rng)]
    )


async def attack_batch(address: Address, rng: random.Random) -> list[Answer]:
    "Many heavy pictures in one request."
    heavy = [content for name in PICTURES if len(content := picture(address.folder, name)) < 500_000]
    part = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    body = b"".join(part + rng.choice(heavy) + b"\r\n" for _ in range(32)) + b"--b--\r\n"
    request = address.request("POST", "/predict/batch", body, "Content-Type: multipart/form-data; boundary=b\r\n")
    return [await ask(address, request, LONG)]


# ------------------------------------------------------------------------------------------------------------ the demo


async def upload(address: Address, content: bytes, name: str = "a.jpg", seconds: float = SHORT) -> Answer:
    "To the demo's folder."
    request = as_request(content, "/gradio_api/upload", "files", name=name)
    return await ask(address, request, seconds)


def file_data(path: str, **more: object) -> dict[str, object]:
    "A file, as the demo's page names it."
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.jpg"} | more


async def call(address: Address, part: str, data: list[object], session: str, cookie: str = "") -> Answer:
    "What a part of the page calls."
    said = {"data": data, "fn_index": address.functions[part], "session_hash": session}
    headers = f"Content-Type: application/json\r\nCookie: {cookie}\r\n"
    return await ask(
        address, address.request("POST", "/gradio_api/run/predict", json.dumps(said).encode(), headers), LONG
    )


async def drop(address: Address, content: bytes, rng: random.Random) -> Answer:
    "A picture on the page, as a browser does it."
    answer = await upload(address, content, seconds=LONG)
    if answer.status != 200:
        return answer
    path, cookie = json.loads(answer.body)[0], answer.headers.get("set-cookie", "").partition(";")[0]
    return await call(address, "drop", [file_data(path), rng.random() * 1e6, None], f"{rng.random()}", cookie)


def without_leak(answer: Answer) -> Answer:
    "The same, or `leak` where there is a file of the server in it."
    leaks = b"root:x:0" in answer.body or b"data:image/" in answer.body or b"CELESTIAL_HOME" in answer.body
    return Answer("leak", answer.headers, answer.body[:200]) if leaks else answer


def stolen(address: Address) -> list[dict[str, object]]:
    "Files that nobody has uploaded."
    here = f"http://127.0.0.1:{address.port}/health"
    paths = [address.secret, "/etc/passwd", "/dev/zero", "/proc/self/environ", "/nowhere", "../../etc/passwd", here, ""]
    return [*map(file_data, paths), file_data("a\0b"), file_data("a" * 5000), file_data("", url=here), {"path": 1}]


async def attack_paths(address: Address, rng: random.Random) -> list[Answer]:
    "A server's files by the function behind each drop area."
    address, session = elsewhere(address, rng), f"{rng.random()}"
    some = rng.sample(stolen(address), 4)
    calls: list[tuple[str, list[object]]] = [("drop", [one, rng.random() * 1e6, None]) for one in some]
    calls += [call for one in some for call in (("compare-drop", [one]), ("compare-show", [None, None, None]))]
    return [without_leak(await call(address, part, data, session)) for part, data in calls]


async def attack_paths_queued(address: Address, rng: random.Random) -> list[Answer]:
    "A server's files by the queue."
    address, session = elsewhere(address, rng), f"{rng.random()}"
    said = {"data": [rng.sample(stolen(address), 4)], "fn_index": address.functions["many-drop"]}
    joined = await ask(address, address.json("/gradio_api/queue/join", said | {"session_hash": session}))
    try:
        async with asyncio.timeout(5):
            reader, writer = await open_connection(address)
            writer.write(address.request("GET", f"/gradio_api/queue/data?session_hash={session}"))
            heard = await reader.readuntil(b"process_completed")
            rest = await reader.read(100_000)
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return [joined]
    writer.transport.abort()
    return [joined, without_leak(Answer(200, {}, heard + rest))]


async def attack_files(address: Address, rng: random.Random) -> list[Answer]:
    "A server's files by Gradio's own routes."
    paths = [f"/gradio_api/file={address.secret}", "/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://[::1"]
    paths += [
        "/gradio_api/file=/dev/zero",
        "/static/../../etc/passwd",
        "/assets/..%2f..%2fetc/passwd",
        "/file/etc/passwd",
    ]
    return [without_leak(await ask(address, address.request("GET", path))) for path in paths]


async def attack_routes(address: Address, rng: random.Random) -> list[Answer]:
    "Nonsense to all of Gradio's routes."
    bodies = [
        {},
        {"data": []},
        {"data": None, "fn_index": 10**9},
        {"data": [1], "fn_index": -1, "session_hash": "x"},
        [],
    ]
    bodies += [{"data": [{}] * 9, "fn_index": rng.randrange(50), "session_hash": "x", "batched": True}]
    names = [
        "run/predict",
        "run/x",
        "api/predict",
        "call/predict",
        "call/v2/x",
        "queue/join",
        "cancel",
        "reset",
        "upload",
    ]
    names += ["component_server", "process_recording", "vibe-edit", "vibe-code", "profiling/clear", "stream/x"]
    names += ["run-history/connect", "undo-vibe-edit", "stream/x/close"]
    posts = [address.json(f"/gradio_api/{name}", rng.choice(bodies)) for name in names]
    gets = [
        "deep_link",
        "info",
        "heartbeat/",
        "call/predict/x",
        "queue/status",
        "upload_progress?upload_id=x",
        "app_id",
    ]
    gets += ["stream/a/0/1/playlist.m3u8", "monitoring", "custom_component/x/client/component/a", "startup-events"]
    requests = [*posts, *(address.request("GET", f"/gradio_api/{name}") for name in gets)]
    return [await ask(address, request, 3) for request in rng.sample(requests, len(requests))]


async def attack_uploads(address: Address, rng: random.Random) -> list[Answer]:
    "60 MB in a moment, and a thousand names that lead elsewhere."
    address = elsewhere(address, rng)
    large = [upload(address, rng.randbytes(10_000_000)) for _ in range(6)]
    small = [
        upload(address, b"x", rng.choice(["../../x", "a" * 300, "", "con", "%00", "é\\..\\x"])) for _ in range(100)
    ]
    return await together([*large, *small])


async def attack_joins(address: Address, rng: random.Random) -> list[Answer]:
    "The queue, by hundreds."
    said = {"data": [[]], "fn_index": address.functions["many-drop"]}
    joins = [address.json("/gradio_api/queue/join", said | {"session_hash": f"{rng.random()}"}) for _ in range(300)]
    answers = []
    for start in range(0, len(joins), 20):
        answers += await together(ask(address, join) for join in joins[start : start + 20])
    return answers


async def attack_streams(address: Address, rng: random.Random) -> list[Answer]:
    "Streams of events that are left open."
    paths = [
        "/gradio_api/queue/data?session_hash={}",
        "/gradio_api/heartbeat/{}",
        "/gradio_api/upload_progress?upload_id={}",
    ]
    asked = [address.request("GET", rng.choice(paths).format(rng.random())) for _ in range(60)]
    return await together(hold(address, request) for request in asked)


async def attack_logins(address: Address, rng: random.Random) -> list[Answer]:
    "Guesses, at a name and at none."
    kind = "Content-Type: application/x-www-form-urlencoded\r\n"
    bodies = [f"username={rng.choice(['ann', 'x'])}&password={rng.random()}".encode() for _ in range(20)]
    return [await ask(address, address.request("POST", "/login", body, kind)) for body in bodies]


# --------------------------------------------------------------------------------------- heads, connections and bodies


async def attack_silence(address: Address, rng: random.Random) -> list[Answer]:
    "1,100 connections that say nothing."
    address = elsewhere(address, rng)
    return await together(ask(address, b"", 15) for _ in range(1100))


async def attack_silence_from_many(address: Address, rng: random.Random) -> list[Answer]:
    "The same from 100 addresses."
    addresses = [elsewhere(address, rng) for _ in range(100)]
    return await together(ask(addresses[i % 100], b"", 15) for i in range(1100))


async def attack_slow_head(address: Address, rng: random.Random) -> list[Answer]:
    "Heads of a byte a second."
    address, first = elsewhere(address, rng), b"GET /health HTTP/1.1\r\nHost: here\r\nX-"
    return await together(ask(address, slowly(first, b"a"), LONG + 5) for _ in range(30))


async def attack_slow_body(address: Address, rng: random.Random) -> list[Answer]:
    "Bodies of a byte a second."
    address, path = (
        elsewhere(address, rng),
        rng.choice(["/predict", "/feedback", "/gradio_api/upload", "/gradio_api/run/x"]),
    )
    first = address.request("POST", path, b"x" * 1_000_000, "Content-Type: multipart/form-data; boundary=b\r\n")[
        :-999_999
    ]
    return await together(ask(address, slowly(first, b"x"), LONG + 5) for _ in range(30))


async def attack_head_of_bytes(address: Address, rng: random.Random) -> list[Answer]:
    "Heads of 24 MB: one header, or one name, or one path."
    first = rng.choice([b"GET /health HTTP/1.1\r\nX-A: ", b"GET /health HTTP/1.1\r\n", b"GET /"])
    return [await ask(elsewhere(address, rng), [first, *[b"a" * 65_536] * 370, b" HTTP/1.1\r\n\r\n"])]


async def attack_head_of_lines(address: Address, rng: random.Random) -> list[Answer]:
    "Heads of many headers."
    many = [rng.choice([101, 1000, 10_000, 300_000]) for _ in range(3)]
    heads = [b"GET /health HTTP/1.1\r\nHost: here\r\n" + b"X-A: a\r\n" * count + b"\r\n" for count in many]
    return [await ask(elsewhere(address, rng), head) for head in heads]


async def attack_form_parts(address: Address, rng: random.Random) -> list[Answer]:
    "20 MB of form parts with nothing in them."
    address = elsewhere(address, rng)
    part = rng.choice(
        [b"--b\r\n\r\n\r\n", b"--b\r\na:\r\n\r\n\r\n", b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n']
    )
    path = rng.choice(["/predict", "/predict/batch", "/explain", "/gradio_api/upload", "/login"])
    body = part * (19_900_000 // len(part)) + b"--b--\r\n"
    return [
        await ask(
            address, address.request("POST", path, body, "Content-Type: multipart/form-data; boundary=b\r\n"), LONG
        )
    ]


async def attack_form_fields(address: Address, rng: random.Random) -> list[Answer]:
    "A million fields of the other kind of form, and a part with a million headers."
    kind = "Content-Type: application/x-www-form-urlencoded\r\n"
    request = address.request("POST", rng.choice(["/login", "/predict", "/feedback"]), b"a=b&" * 1_000_000, kind)
    headers = b"--b\r\n" + b"a: b\r\n" * 1_000_000 + b"\r\n\r\n--b--\r\n"
    form = address.request("POST", "/predict", headers, "Content-Type: multipart/form-data; boundary=b\r\n")
    return [await ask(elsewhere(address, rng), one, LONG) for one in (request, form)]


async def attack_json_keys(address: Address, rng: random.Random) -> list[Answer]:
    "500,000 keys."
    body = json.dumps({f"k{i}": i for i in range(500_000)}).encode()
    path = rng.choice(["/feedback", "/feedback", "/gradio_api/run/predict", "/gradio_api/queue/join"])
    return [await ask(elsewhere(address, rng), address.json(path, body), LONG)]


async def attack_json_depth(address: Address, rng: random.Random) -> list[Answer]:
    "Brackets in brackets, and numbers without end."
    bodies = [
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b"[" * 900 + b"]" * 900,
        b"9" * 4400,
        b'"\\ud800"',
        b"\xff\xfe{}",
        b"NaN",
    ]
    paths = ["/feedback", "/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/component_server"]
    return [await ask(elsewhere(address, rng), address.json(rng.choice(paths), body)) for body in bodies]


async def attack_feedback(address: Address, rng: random.Random) -> list[Answer]:
    "Judgements of answers that nobody was given."
    bodies = [{"request_id": "x" * 64, "correct": True}, {"request_id": "\0", "correct": False, "label": "\ud83d"}]
    bodies += [{"request_id": f"{rng.random()}", "correct": False, "comment": "x" * 2000}] * 20
    return [await ask(address, address.json("/feedback", body)) for body in bodies]


def chunked(path: str) -> bytes:
    "The head of a request that doesn't tell its length."
    return f"POST {path} HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


async def attack_endless_body(address: Address, rng: random.Random) -> list[Answer]:
    "Three megabytes a second, without end."
    path = rng.choice(["/predict", "/feedback", "/gradio_api/upload", "/gradio_api/run/predict", "/nowhere", "/health"])
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    return [await ask(elsewhere(address, rng), slowly(chunked(path), chunk, 20, 0.02), LONG)]


async def attack_small_chunks(address: Address, rng: random.Random) -> list[Answer]:
    "A body of a million chunks."
    parts = [chunked(rng.choice(["/predict", "/feedback"])), *[b"1\r\nx\r\n" * 10_000] * 100, b"0\r\n\r\n"]
    return [await ask(elsewhere(address, rng), parts, LONG)]


async def attack_slow_readers(address: Address, rng: random.Random) -> list[Answer]:
    "Large answers that nobody takes."
    paths = ["/docs/static/swagger-ui-bundle.js", "/", "/config", "/metrics"]
    asked = [address.request("GET", rng.choice(paths)) * 20 for _ in range(30)]
    address = elsewhere(address, rng)
    return await together(hold(address, request) for request in asked)


async def attack_pipelined(address: Address, rng: random.Random) -> list[Answer]:
    "5,000 requests at once on one connection."
    return [await hold(elsewhere(address, rng), address.request("GET", "/health") * 5000, 5)]


MALFORMED = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    b"GET /\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"G\xc3\x89T / HTTP/1.1\r\n\r\n",
    b"GET /%zz%00%c0%af HTTP/1.1\r\nHost: here\r\n\r\n",
    b"GET http://elsewhere/ HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
    b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: here\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: -1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST /predict HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    b"POST /predict HTTP/1.1\r\nHost: here\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: multipart/form-data\r\nContent-Length: 1\r\n\r\nx",
    b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: \xff; boundary=\xff\r\nContent-Length: 1\r\n\r\nx",
    b"GET /predict HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
    b"GET /login HTTP/1.1\r\nHost: here\r\nCookie: " + b"a=b; " * 1000 + b"\r\n\r\n",
    b'GET / HTTP/1.1\r\nX-Forwarded-For: 1.1.1.1, \x01\r\nX-Forwarded-Host: evil/\r\nForwarded: for="[\r\n\r\n',
    b"GET / HTTP/1.1\r\nHost: here\r\nRange: bytes=0-,0-,0-\r\nIf-Modified-Since: x\r\nAccept-Language: "
    + b"a," * 999
    + b"\r\n\r\n",
    b"GET /gradio_api/queue/data HTTP/1.1\r\nHost: here\r\n\r\n",
    b"HEAD /nowhere HTTP/1.1\r\nHost: here\r\n\r\n",
    b"\r\n" * 10_000,
    b"\0" * 10_000,
]


async def attack_malformed(address: Address, rng: random.Random) -> list[Answer]:
    "What isn't HTTP, or only nearly."
    noise = [rng.randbytes(rng.randint(1, 3000)) for _ in range(5)]
    return [await ask(elsewhere(address, rng), request, 2) for request in [*MALFORMED, *noise]]


Attack = Callable[[Address, random.Random], Awaitable[list[Answer]]]
ATTACKS: dict[str, Attack] = {
    name.removeprefix("attack_").replace("_", " "): attack
    for name, attack in globals().items()
    if "attack_" in name[:7]
} | {name: functools.partial(send_picture, name) for name in PICTURES}
# These take no work, only time, so they run beside the others.
WAITING = {"silence", "silence from many", "slow head", "slow body", "streams", "slow readers", "endless body"}
