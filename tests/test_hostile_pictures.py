"Pictures that are made to hurt: memory by shape, time by scans and chunks, metadata that makes no sense, chance."

import asyncio
import io
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from programs import resident_mb
from serving import chunk, encoded, neptune, running, tiny_model, until

from celestial_ml.core.errors import CelestialError
from celestial_ml.core.params import Prepare
from celestial_ml.data.images import (
    MAX_PARTS,
    MAX_SCANS,
    SIDE,
    Limits,
    check_polyglot,
    decode_image,
    open_image,
    read_image,
)
from celestial_ml.data.prepare import Preparer
from celestial_ml.serve.predictor import Predictor
from celestial_ml.serve.scorer import Scorer
from celestial_ml.serve.service_metrics import ServiceMetrics

FAULTS = Path(__file__).resolve().parent.parent.parent / "shared/faults"


def refusal(content: bytes, **options: object) -> str:
    "The code that reading ends in; ok where it doesn't."
    try:
        decode_image(content, **options)
    except CelestialError as e:
        assert e.message and e.hint
        return e.code
    return "ok"


# ---------------------------------------------------------------------------------------------------------- the inputs


def segment(marker: int, data: bytes = b"") -> bytes:
    "A segment of a JPEG."
    return bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2) + data


def with_chunks(*chunks: bytes) -> bytes:
    "A PNG with these after its head."
    content = encoded(Image.new("RGB", (64, 64), "red"))
    return content[:33] + b"".join(chunks) + content[33:]


def with_segments(*segments: bytes) -> bytes:
    "A JPEG with these at its beginning."
    content = encoded(Image.new("RGB", (64, 64), "red"), "JPEG")
    return content[:2] + b"".join(segments) + content[2:]


def with_scans(width: int, height: int, scans: int) -> bytes:
    "A progressive JPEG whose last scan is there again and again, empty."
    content = encoded(Image.effect_noise((width, height), 80), "JPEG", progressive=True, quality=20)
    last = content[content.rindex(b"\xff\xda") :]
    head = last[: 2 + int.from_bytes(last[2:4])]
    return content[:-2] + scans * (head + bytes(4)) + content[-2:]


def with_junk_chunks(count: int) -> bytes:
    "A WebP with empty chunks after its picture."
    content = encoded(Image.new("RGB", (64, 64)), "WEBP")[8:] + count * b"junk\0\0\0\0"
    return b"RIFF" + len(content).to_bytes(4, "little") + content


def tiny_pieces(count: int) -> bytes:
    "A PNG whose pixels come in empty pieces."
    return with_chunks(count * chunk(b"IDAT"))


def webp_claims(side: int) -> bytes:
    "A lossless WebP that says that it's large."
    content = bytearray(encoded(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    content[21:25] = (side - 1 | (side - 1) << 14).to_bytes(4, "little")
    return bytes(content)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "8 x 30,000": (lambda: encoded(Image.new("L", (8, 30_000))), "too_narrow"),
    "30,000 x 8": (lambda: encoded(Image.new("RGBA", (30_000, 8))), "too_narrow"),
    "65,500 x 700": (lambda: encoded(Image.new("L", (65_500, 700)), "JPEG"), "too_narrow"),
    "8 x 6,250,000": (lambda: encoded(Image.new("1", (8, 6_250_000))), "too_narrow"),
    "16,000 x 9 WebP": (lambda: encoded(Image.new("L", (16_000, 9)), "WEBP", method=0), "too_narrow"),
    "a WebP of 16,383²": (lambda: webp_claims(16_383), "too_large"),
    "a WebP of 7,000²": (lambda: webp_claims(7_000), "too_costly"),
    "20,000 scans": (lambda: with_scans(64, 64, 20_000), "too_costly"),
    "10,000 large scans": (lambda: with_scans(2000, 1500, 10_000), "too_costly"),
    "1.5 million chunks": (lambda: with_chunks(1_500_000 * chunk(b"teXt")), "too_costly"),
    "1.5 million pieces": (lambda: tiny_pieces(1_500_000), "too_costly"),
    "2 million WebP chunks": (lambda: with_junk_chunks(2_000_000), "too_costly"),
    **{
        f"segments {marker:02x}": (lambda m=marker: with_segments(4_000_000 * segment(m)), "too_costly")
        for marker in (0xC4, 0xDB, 0xE0, 0xE1, 0xE2, 0xED, 0xFE)
    },
    "intervals": (lambda: with_segments(3_000_000 * segment(0xDD, b"\0\0")), "too_costly"),
    "19 MB of filling": (lambda: with_segments(b"\xff" * 19_000_000), "ok"),
    "19 MB of nothing": (lambda: with_segments(bytes(19_000_000)), "not_an_image"),
    "19 MB behind": (lambda: with_segments() + random.Random(1).randbytes(19_000_000), "ok"),
    "many chunks": (lambda: with_chunks((MAX_PARTS - 100) * chunk(b"teXt")), "ok"),
    "many pieces": (lambda: tiny_pieces(MAX_PARTS - 100), "ok"),
    "many segments": (lambda: with_segments((MAX_PARTS - 100) * segment(0xC4)), "ok"),
    "many scans": (lambda: with_scans(1600, 1200, MAX_SCANS - 20), "ok"),
    "texts that unpack to 1.9 GB": (
        lambda: with_chunks(1900 * chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))),
        "ok",
    ),
    "a profile that unpacks to 100 MB": (
        lambda: with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000)))),
        "ok",
    ),
    "a thousand pictures in one": (
        lambda: encoded(Image.new("L", (8, 8)), "MPO", save_all=True, append_images=[Image.new("L", (8, 8))] * 1000),
        "ok",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pictures_take_little_time_and_memory(kind: str) -> None:
    make, code = HOSTILE[kind]
    content = make()
    decode_image(encoded(np.zeros((2049, 2049, 3), np.uint8)))  # the process is there
    before, busy, began = resident_mb(), time.process_time(), time.monotonic()
    assert refusal(content) == code
    assert time.process_time() - busy < 1, "of this process"
    assert time.monotonic() - began < 3
    assert resident_mb() - before < 60


LARGE = {
    "RGBA": lambda: encoded(Image.new("RGBA", (5000, 4000), (200, 100, 50, 128)), compress_level=1),
    "LA": lambda: encoded(Image.new("LA", (5000, 4000), (200, 128)), compress_level=1),
    "16 bits": lambda: encoded(np.full((4000, 5000), 100 * 257, np.uint16), compress_level=1),
    "palette": lambda: encoded(Image.new("P", (5000, 4000)), transparency=0),
    "1 bit": lambda: encoded(Image.new("1", (5000, 4000), 1)),
    "CMYK": lambda: encoded(Image.new("CMYK", (5000, 4000), (55, 155, 205, 0)), "JPEG"),
    "progressive": lambda: encoded(Image.new("RGB", (5000, 4000), (200, 100, 50)), "JPEG", progressive=True),
    "WebP": lambda: encoded(Image.new("RGBA", (5000, 4000), (200, 100, 50, 128)), "WEBP", method=0),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_picture_is_the_mean_of_its_pixels(kind: str) -> None:
    colour = {
        "RGBA": (100, 50, 25), "LA": (100,) * 3, "16 bits": (100,) * 3, "palette": (0,) * 3, "1 bit": (255,) * 3,
        "CMYK": (200, 100, 50), "progressive": (200, 100, 50), "WebP": (100, 50, 25),
    }[kind]  # fmt: skip
    before = resident_mb()
    picture = read_image(LARGE[kind]())
    assert (picture.width, picture.height) == (5000, 4000)
    assert SIDE / 2 < max(picture.pixels.shape) <= SIDE
    assert abs(picture.pixels.shape[0] * 5 - picture.pixels.shape[1] * 4) <= 5
    assert abs(picture.pixels.reshape(-1, 3).astype(int) - colour).max() <= 3
    assert resident_mb() - before < 150, "most of which made the file"


def test_a_reduced_picture_is_the_same_to_the_network() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    prepare, options = Preparer(Prepare(size=224)), {"PNG": {"compress_level": 1}, "JPEG": {"quality": 95}}
    for kind, width, height, most in (("PNG", 4000, 3000, 0.5), ("JPEG", 3000, 4000, 0.5), ("JPEG", 5001, 3333, 2)):
        content = encoded(noise.resize((width, height), Image.Resampling.BILINEAR), kind, **options[kind])
        off = abs(prepare(decode_image(content)).astype(int) - prepare(np.asarray(Image.open(io.BytesIO(content)))))
        assert off.mean() < most and off.max() <= 20 * most, (width, height, kind)


def test_a_picture_of_2048_pixels_is_not_touched() -> None:
    for shape in ((2048, 2048), (2048, 100), (300, 2048)):
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        assert (decode_image(encoded(pixels, compress_level=1)) == pixels).all()


# ------------------------------------------------------------------------------------------------------------ metadata


def ifd(*entries: tuple[int, int, int, bytes], order: str = "little", following: int = 0) -> bytes:
    "EXIF of one directory: tag, type, count and four bytes of value each."
    body = b"".join(t.to_bytes(2, order) + k.to_bytes(2, order) + n.to_bytes(4, order) + v for t, k, n, v in entries)
    head = b"II*\0\x08\0\0\0" if order == "little" else b"MM\0*\0\0\0\x08"
    return b"Exif\0\0" + head + len(entries).to_bytes(2, order) + body + following.to_bytes(4, order)


SIDEWAYS = (0x0112, 3, 1, b"\6\0\0\0")
EXIF = {
    "sideways": (ifd(SIDEWAYS), True),
    "sideways, the other way around": (ifd((0x0112, 3, 1, b"\0\6\0\0"), order="big"), True),
    "sideways, in four bytes": (ifd((0x0112, 4, 1, b"\6\0\0\0")), True),
    **{
        f"tag {tag:x} as type {kind}": (ifd(SIDEWAYS, (tag, kind, 4, b"abc\0")), True)
        for tag in (0x0100, 0x011A, 0x011B, 0x0128, 0x0103, 0x8769, 0x8825, 0x829A, 0x927C, 0xA005)
        for kind in (2, 5, 7, 12, 99)
    },
    "a directory that follows itself": (ifd(SIDEWAYS, following=8), True),
    "a count beyond the end": (ifd(SIDEWAYS, (0x010F, 2, 2**32 - 1, b"\xff" * 4)), True),
    "an orientation in words": (ifd((0x0112, 2, 4, b"abc\0")), False),
    "an orientation of 9": (ifd((0x0112, 3, 1, b"\x09\0\0\0")), False),
    "65,535 entries": (b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + ifd(SIDEWAYS)[16:] * 100, True),
    "a directory far away": (b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20), False),
    "a head alone": (b"Exif\0\0II*\0", False),
    "nothing": (b"Exif\0\0", False),
    "noise": (b"Exif\0\0" + random.Random(0).randbytes(3000), False),
}


@pytest.mark.parametrize("kind", EXIF)
@pytest.mark.parametrize("place", ["JPEG", "PNG", "WEBP"])
def test_nonsense_in_exif_does_not_lose_a_picture(kind: str, place: str) -> None:
    exif, sideways = EXIF[kind]
    content = encoded(Image.new("RGB", (60, 40), "red"), place)
    if place == "JPEG":
        content = content[:2] + segment(0xE1, exif) + content[2:]
    elif place == "PNG":
        content = content[:33] + chunk(b"eXIf", exif[6:]) + content[33:]
    else:
        content = encoded(Image.new("RGB", (60, 40), "red"), place, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(content).shape == ((60, 40, 3) if sideways else (40, 60, 3))


@pytest.mark.skipif(not FAULTS.is_dir(), reason="the pictures that failed are not here")
def test_pictures_that_crashed_a_batch_once() -> None:
    for path in sorted(FAULTS.glob("exif_*.img")):
        assert decode_image(path).shape == (60, 40, 3)


@pytest.mark.parametrize("place", ["JPEG", "PNG", "WEBP"])
def test_a_wrong_picture_is_an_error_and_never_a_warning(place: str) -> None:
    chance = random.Random(place)
    exif = ifd(SIDEWAYS, (0x011A, 2, 4, b"abc\0"))[6:]
    whole = encoded(Image.effect_noise((40, 30), 60).convert("P" if place == "PNG" else "RGB"), place, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1500):
            content = bytearray(whole)
            for _ in range(chance.randrange(1, 6)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            start = chance.randrange(len(content))
            del content[start : start + chance.choice([0, 0, 1, 30, 5000])]
            refusal(bytes(content))  # anything but a CelestialError goes through


# -------------------------------------------------------------------------------------------------------- two in one


def test_random_bytes_are_not_taken_for_a_web_page() -> None:
    words = [b"<svg ", b"<SCRIPT>", b"<html>", b"<?php "]
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        content = encoded(pixels, kind, **options)
        middle = len(content) // 2
        for one in words:
            check_polyglot(content[:middle] + one + content[middle + len(one) :])
            for hidden in (content + one, content + bytes(100_000) + one + bytes(100_000)):
                with pytest.raises(CelestialError) as refused:
                    check_polyglot(hidden)
                assert refused.value.code == "polyglot"


def test_text_is_searched_only_where_it_can_be() -> None:
    page = b"<svg onload=alert(1)>"
    progressive = encoded(Image.effect_noise((64, 64), 60), "JPEG", progressive=True)
    scan = progressive.rindex(b"\xff\xda")
    webp = encoded(Image.new("RGB", (64, 64)), "WEBP", xmp=page)
    places = [with_segments(segment(marker, page)) for marker in (0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE)]
    places += [progressive[:scan] + segment(0xFE, page) + progressive[scan:]]
    places += [with_chunks(chunk(kind, b"a\0" + page)) for kind in (b"tEXt", b"iTXt", b"eXIf", b"abCd")]
    places += [webp, with_junk_chunks(0) + b"text" + page]
    for content in places:
        with pytest.raises(CelestialError) as refused:
            check_polyglot(content)
        assert refused.value.code == "polyglot"


# ------------------------------------------------------------------------------------------------------- other processes


def test_a_limit_of_memory_and_of_time() -> None:
    large = LARGE["RGBA"]()
    with pytest.raises(CelestialError) as refused:
        read_image(large, limits=Limits(megabytes=60))
    assert refused.value.code == "too_costly"
    with pytest.raises(CelestialError) as refused:
        read_image(large, limits=Limits(seconds=0.01))
    assert refused.value.code == "too_costly"
    assert read_image(large).width == 5000


WAITS = """
import sys, time
from celestial_ml.data.images import _processes, read_costly
read_costly(open(sys.argv[1], "rb").read())
import os
print(_processes(os.getpid(), 500).idle[0][0].pid, flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("end", ["by itself", "killed"])
def test_no_process_outlives_its_parent(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.png").write_bytes(neptune())
    command = [sys.executable, "-c", WAITS, str(tmp_path / "a.png"), "0" if end == "by itself" else "60"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    if end == "killed":
        parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=30)

    def ended() -> bool:
        path = Path(f"/proc/{child}/stat")
        return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"

    until(ended, 10)


def test_threads_share_the_processes_and_a_fork_has_its_own() -> None:
    contents = [encoded(Image.new("RGB", (2100, 2100), (level, 0, 0))) for level in range(0, 200, 25)]
    with ThreadPoolExecutor(8) as pool:
        levels = [picture[0, 0, 0] for picture in pool.map(decode_image, contents)]
    assert levels == list(range(0, 200, 25))
    if (child := os.fork()) == 0:
        os._exit(0 if decode_image(contents[3])[0, 0, 0] == 75 else 1)
    assert os.waitpid(child, 0)[1] == 0 and decode_image(contents[4])[0, 0, 0] == 100


# ------------------------------------------------------------------------------------------------------------ the scorer


def test_costly_pictures_fill_few_places_and_do_not_delay_others(tmp_path: Path) -> None:
    model = Predictor(tiny_model(tmp_path / "model"))
    costly = encoded(Image.effect_noise((4000, 4000), 60), "JPEG", quality=90)

    async def both() -> tuple[list[object], list[float]]:
        scorer = Scorer(ServiceMetrics(), costly=3, patience=20)
        await scorer.score(costly, model)  # the process is there
        large = [asyncio.create_task(scorer.score(costly, model)) for _ in range(12)]
        waits = []
        while not all(task.done() for task in large):
            began = time.monotonic()
            await scorer.score(small, model)
            waits.append(time.monotonic() - began)
        answers = await asyncio.gather(*large, return_exceptions=True)
        scorer.close()
        return answers, waits

    small = neptune()
    answers, waits = asyncio.run(both())
    statuses = Counter(one.status if isinstance(one, CelestialError) else 200 for one in answers)
    assert set(statuses) == {200, 503} and 3 <= statuses[200] <= 6
    assert len(waits) > 10 and float(np.quantile(waits, 0.9)) < 0.25


def test_a_waiting_request_is_answered_when_its_time_is_over(tmp_path: Path) -> None:
    model = Predictor(tiny_model(tmp_path / "model"))
    stuck = threading.Event()

    async def waiting() -> tuple[list[object], float]:
        scorer = Scorer(ServiceMetrics(), patience=0.3)
        scorer.small.answer, answer = (lambda jobs: stuck.wait(30)), scorer.small.answer
        began = time.monotonic()
        answers = await asyncio.gather(*(scorer.score(neptune(), model) for _ in range(5)), return_exceptions=True)
        took = time.monotonic() - began
        scorer.small.answer = answer
        stuck.set()
        assert (await scorer.score(neptune(), model)).prediction.label == "Neptune"
        scorer.close()
        return answers, took

    answers, took = asyncio.run(waiting())
    assert [(one.status, one.headers["Retry-After"]) for one in answers] == [(503, "1")] * 5
    assert took < 2


# ------------------------------------------------------------------------------------------------------------ the service


def test_an_attack_is_refused_healthy_clients_are_not_and_memory_comes_back(tmp_path: Path) -> None:
    kinds = ("8 x 30,000", "a WebP of 7,000²", "10,000 large scans", "1.5 million chunks", "segments e1", "many scans")
    hostile = [HOSTILE[kind][0]() for kind in kinds] + [LARGE[kind]() for kind in ("RGBA", "CMYK", "progressive")]
    model, small = tiny_model(tmp_path / "model"), neptune("JPEG")
    with running(model, tmp_path / "log", demo=False, max_bytes=30_000_000) as url:
        with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(4) as pool:
            post = lambda content, path="/predict": client.post(path, files={"image": content})  # noqa: E731
            for content in (small, LARGE["palette"]()) * 2:
                assert post(content).status_code == 200
            process = int(float(client.get("/metrics").text.split("\ncelestial_process_id ")[1].split()[0]))
            before = resident_mb(process)
            attack = [pool.submit(post, content, path) for content in hostile for path in ("/predict", "/explain")]
            waits = []
            while not all(one.done() for one in attack):
                began = time.monotonic()
                assert post(small).status_code == 200
                waits.append(time.monotonic() - began)
            statuses = Counter(one.result().status_code for one in attack)
            post(small)
            after = resident_mb(process)
            memory = client.get("/metrics").text
    assert set(statuses) <= {200, 400, 413, 415, 503} and statuses[413] >= 4, statuses
    assert float(np.quantile(waits, 0.99)) < 1.5
    assert after - before < 100, memory
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and "Warning" not in log


def test_a_request_of_many_large_pictures_is_answered(tmp_path: Path) -> None:
    files = [("images", (f"{i}.png", encoded(Image.new("RGB", (2100, 2000), (i, 0, 0))))) for i in range(32)]
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", demo=False, patience=30) as url:
        answer = httpx.post(f"{url}/predict/batch", files=files, timeout=60)
        assert answer.status_code == 200 and all("label" in one for one in answer.json()["answers"])


def test_explain_obeys_the_limit_of_pixels(tmp_path: Path) -> None:
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", demo=False, max_pixels=10_000) as url:
        for path in ("/predict", "/explain"):
            answer = httpx.post(f"{url}{path}", files={"image": neptune()}, timeout=30)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


@pytest.mark.slow
def test_a_50_megapixel_photograph_of_each_kind() -> None:
    base = np.random.default_rng(0).integers(0, 256, (781, 1000, 3), dtype=np.uint8)
    photograph = Image.fromarray(base).resize((8000, 6250))
    for kind, options in (
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 90, "progressive": True}),
        ("PNG", {"compress_level": 1}),
    ):
        began = time.monotonic()
        picture = read_image(encoded(photograph, kind, **options), limits=Limits(seconds=30))
        print(kind, options, f"{time.monotonic() - began:.1f} s")
        assert (picture.width, picture.height, picture.pixels.shape) == (8000, 6250, (1563, 2000, 3))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 700_000
    assert open_image(encoded(photograph, "JPEG", quality=90)).is_costly
