"`celestial batch` on what nobody should send: every picture has a row or a line, and time and memory stay bounded."

import bz2
import gzip
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from programs import web_server
from serving import encoded, tiny_model

from celestial_ml.batch.job import Result, batch
from celestial_ml.batch.parts import places
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import read_json
from celestial_ml.planets.renderer import render
from celestial_ml.serve.predictor import Predictor

MARS, NEPTUNE = encoded(render("Mars")), encoded(render("Neptune"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(tiny_model(tmp_path_factory.mktemp("model")))


def bad_of(result: Result) -> dict[int, str]:
    "The codes of the bad pictures, by row."
    lines = [json.loads(line) for line in result.where.bad.read_text().splitlines()]
    return {line["row"]: line["code"] for line in lines}


def score(source: Path | str, model: Predictor) -> tuple[pd.DataFrame, dict[int, str]]:
    "Score a source twice, which must be the same as once; the answers and the bad pictures, each row in one of them."
    out = Path(os.environ["PYTEST_OUT"]) / f"out-{time.monotonic_ns()}"
    result = batch(str(source), out, model)
    assert batch(str(source), out, model).before == result.items == result.rows + result.bad
    table, bad = pd.read_parquet(out), bad_of(result)
    assert sorted([*table.row, *bad]) == list(range(result.items))
    return table, bad


@pytest.fixture(autouse=True)
def out(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    "Where answers go; URLs have a second, not a minute."
    monkeypatch.setenv("PYTEST_OUT", str(tmp_path_factory.mktemp("out")))
    monkeypatch.setenv("CELESTIAL_URL_SECONDS", "1")


RUN = """
import atexit, re, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
sys.argv = ["celestial", *sys.argv[2:]]
from celestial_ml.cli.app import main
main()
"""


def command(
    source: Path | str, out: Path, model: Predictor, *more: str, gigabytes: float = 3
) -> tuple[int, str, float]:
    "Exit code, standard error and peak memory in MB of the command, which may not have more than so much."
    told = [sys.executable, "-c", RUN, str(int(gigabytes * 1e9)), "batch", str(source), str(out)]
    told += ["--model", str(model.folder), *more]
    result = subprocess.run(told, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stderr, int(result.stdout.split()[-1]) / 1000


def ends(source: Path | str, tmp_path: Path, model: Predictor) -> int:
    "How many pictures were kept of a source that breaks off, which the command says without a traceback."
    code, said, megabytes = command(source, tmp_path / "ends", model)
    assert code == 2 and "Traceback" not in said and said.startswith("error"), said
    assert megabytes < 700, megabytes
    assert not list((tmp_path / "ends").rglob(".*part*")), "nothing is half-written"
    return sum(pq.read_metadata(path).num_rows for path in (tmp_path / "ends").glob("part-*.parquet"))


# -- tar ----------------------------------------------------------------------------------------------------------


def tarred(*members: tuple[str, bytes] | tarfile.TarInfo, kind: int = tarfile.GNU_FORMAT) -> bytes:
    "A tar file."
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, b"")
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    "A member that isn't a file."
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    "A member's header with a size that isn't true."
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136], block[148:156], block[156:157] = size, b" " * 8, kind
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_a_tar_keeps_every_picture(model: Predictor, tmp_path: Path) -> None:
    kinds = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"Z"]
    links = [special(f"{i}.jpg", kind, "a.jpg") for i, kind in enumerate(kinds)]
    content = tarred(("a.jpg", MARS), ("a.jpg", NEPTUNE), *links, special("d.jpg", tarfile.DIRTYPE), ("._a.jpg", b""))
    (tmp_path / "a.tar").write_bytes(content + tarred(("x" * 300 + ".jpg", MARS)))
    table, bad = score(tmp_path / "a.tar", model)
    assert table.label.tolist() == ["Mars", "Neptune", "Mars"] and set(bad.values()) == {"unreadable"}
    assert table.path.nunique() == 2 and table.row.tolist() == [0, 1, 7] and len(bad) == 5


def test_ignored_members_of_a_tar_are_counted(model: Predictor, tmp_path: Path) -> None:
    content = tarred(("a.jpg", MARS), ("a.json", b"{}"), ("._a.jpg", b"x"), ("@eaDir/a.jpg", MARS))
    (tmp_path / "a.tar").write_bytes(content)
    result = batch(f"{tmp_path}/a.tar", tmp_path / "scores", model)
    assert (result.rows, result.passed_over) == (1, {".json": 1, "leftover": 2})
    assert batch(f"{tmp_path}/a.tar", tmp_path / "scores", model).passed_over == result.passed_over


@pytest.mark.parametrize("name", ["GNU.sparse.map", "GNU.sparse.major", "old"])
def test_sparse_members(name: str, model: Predictor, tmp_path: Path) -> None:
    info = tarfile.TarInfo("hole.jpg")
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.realsize": str(1 << 40)}
    if name == "GNU.sparse.major":
        info.pax_headers = {name: "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    content = tarred(("a.jpg", MARS), info, ("b.jpg", NEPTUNE), kind=tarfile.PAX_FORMAT)
    if name == "old":
        old = bytearray(header("hole.jpg", b"00000000000\0", tarfile.GNUTYPE_SPARSE))
        old[482], old[148:156] = 1, b" " * 8  # its map goes on in further blocks
        old[148:156] = b"%06o\0 " % sum(old)
        more = bytearray(512)
        more[504] = 1
        map_ = bytes(more) * 50 + bytes(512)
        content = (
            tarred(("a.jpg", MARS))[: 512 + -(-len(MARS) // 512) * 512] + bytes(old) + map_ + tarred(("b.jpg", NEPTUNE))
        )
    (tmp_path / "a.tar").write_bytes(content)
    table, bad = score(tmp_path / "a.tar", model)
    assert table.label.tolist() == ["Mars", "Neptune"] and bad == {1: "unreadable"}


HUGE = b"%011o\0" % (6 << 30)
BOMBS: dict[str, Callable[[], bytes]] = {
    "a name of 6 GB": lambda: header("x", HUGE, b"L") + bytes(512),
    "a link's name of 6 GB": lambda: header("x", HUGE, b"K") + bytes(512),
    "a PAX record of 6 GB": lambda: header("x", HUGE, b"x") + bytes(512),
    "a global record of 6 GB": lambda: header("x", HUGE, b"g") + bytes(512),
    "a negative size": lambda: header("b.jpg", b"\xff" * 11 + b"\x00"),
    "names of names": lambda: (header("x", b"00000000001\0", b"L") + bytes(512)) * 5000,
    "a broken header": lambda: b"x" * 512 + tarred(("b.jpg", MARS)),
    "no end": lambda: b"",
    "half a member": lambda: header("b.jpg", b"%011o\0" % 2000) + MARS[:100],
    "a negative PAX size": lambda: (
        tarred(("b.jpg", MARS), kind=tarfile.PAX_FORMAT).replace(b"", b"", 0) and pax({"size": "-5120"})
    ),
    "a PAX size that isn't one": lambda: pax({"GNU.sparse.realsize": "many"}),
}


def pax(records: dict[str, str]) -> bytes:
    "A tar file whose member has such records."
    info = tarfile.TarInfo("b.jpg")
    info.pax_headers = records
    return tarred(info, kind=tarfile.PAX_FORMAT)


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_tar_with_wrong_sizes(name: str, packed: bool, model: Predictor, tmp_path: Path) -> None:
    content = tarred(("a.jpg", MARS))[: 512 + -(-len(MARS) // 512) * 512] + BOMBS[name]()
    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(gzip.compress(content) if packed else content)
    out = tmp_path / "scores"
    began = time.monotonic()
    with pytest.raises(CelestialError) as caught:
        batch(str(path), out, model)
    assert caught.value.exit_code == 2 and time.monotonic() - began < 5
    assert len(pd.read_parquet(out)) == 1, "what came before is kept"


def zeros(path: Path, head: bytes, count: int) -> None:
    "A file packed by gzip, of a head and so many megabytes of zeros."
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(count):
            file.write(bytes(1_000_000))


def test_a_member_of_gigabytes_of_zeros(model: Predictor, tmp_path: Path) -> None:
    head = tarred(("a.jpg", MARS))[: 512 + -(-len(MARS) // 512) * 512]
    zeros(tmp_path / "a.tar.gz", head + header("zeros.jpg", b"%011o\0" % 1_000_000_000), 400)
    assert ends(tmp_path / "a.tar.gz", tmp_path, model) == 1


def test_an_archive_with_endless_zeros_at_its_end(model: Predictor, tmp_path: Path) -> None:
    zeros(tmp_path / "a.tar.gz", tarred(("a.jpg", MARS)), 200)
    assert ends(tmp_path / "a.tar.gz", tmp_path, model) == 1


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip", "parquet"])
@pytest.mark.parametrize(
    "content", [b"", b"words", bytes(1024), b"\x1f\x8b\x08broken", b"BZh91AY&SYbroken", b"PK\x05\x06"]
)
def test_a_file_that_is_not_an_archive(suffix: str, content: bytes, model: Predictor, tmp_path: Path) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(CelestialError) as caught:
        batch(f"{tmp_path}/a.{suffix}", tmp_path / "scores", model)
    assert caught.value.exit_code == 2


def test_damaged_compressed_data(model: Predictor, tmp_path: Path) -> None:
    content = tarred(*((f"{i}.jpg", MARS) for i in range(20)))
    for name, packed in {"a.tar.gz": gzip.compress(content), "a.tar.bz2": bz2.compress(content)}.items():
        wrong = bytearray(packed)
        wrong[len(wrong) // 2] ^= 255
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(CelestialError):
            batch(f"{tmp_path}/{name}", tmp_path / f"{name}-scores", model)


# -- ZIP ----------------------------------------------------------------------------------------------------------


def zipped(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    "A ZIP, whose names are written as they are."
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method
            archive.writestr(info, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_keeps_every_picture(model: Predictor, tmp_path: Path) -> None:
    names = ["Mars\\a.jpg", "b.jpg", "b.jpg", "__MACOSX/._b.jpg", "inner.zip", "Mars\\", "12:30.jpg"]
    wrong = {"../c.jpg": MARS, "/d.jpg": MARS, "..\\e.jpg": MARS, "C:\\f.jpg": MARS, "bomb.jpg": bytes(9_000_000)}
    members = [(name, MARS) for name in names] + list(wrong.items())
    table, bad = score(zipped(tmp_path / "a.zip", *members), model)
    assert sorted(path.split("::")[0] for path in table.path) == [
        "zip://12:30.jpg",
        "zip://Mars\\a.jpg",
        "zip://b.jpg",
        "zip://b.jpg",
    ]
    assert len(bad) == 5 and set(bad.values()) == {"unreadable"}


def test_a_zip_with_wrong_sizes(model: Predictor, tmp_path: Path) -> None:
    for at, value in ((24, 150_000_000), (24, 5), (42, 999_999), (10, 14), (8, 1)):
        content = bytearray(zipped(tmp_path / "a.zip", ("a.jpg", MARS), ("b.jpg", NEPTUNE)).read_bytes())
        entry = content.rindex(b"PK\x01\x02") + at
        width = 2 if at in (8, 10) else 4
        content[entry : entry + width] = value.to_bytes(width, "little")
        (tmp_path / "a.zip").write_bytes(content)
        table, bad = score(tmp_path / "a.zip", model)
        assert table.label.tolist() == ["Mars"] and bad == {1: "unreadable"}, (at, value)
    local = content.index(b"b.jpg")
    content[entry : entry + 2], content[local] = b"\0\0", 0xFF  # its two names differ
    (tmp_path / "a.zip").write_bytes(content)
    assert score(tmp_path / "a.zip", model)[1] == {1: "unreadable"}


# -- Parquet ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    "Two pictures on the disk."
    (tmp_path / "a.png").write_bytes(MARS), (tmp_path / "b.png").write_bytes(NEPTUNE)
    return [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]


KINDS = {
    "categories": pa.dictionary(pa.int32(), pa.string()),
    "large": pa.large_string(),
    "view": pa.string_view(),
    "bytes": pa.binary(),
    "large categories": pa.dictionary(pa.int8(), pa.large_string()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_paths_of_every_type(kind: str, files: list[str], model: Predictor, tmp_path: Path) -> None:
    paths = pa.array([files[0], None, files[1], files[0], "nowhere.jpg", "", "a\0.jpg"]).cast(KINDS[kind])
    pq.write_table(pa.table({"path": paths}), tmp_path / "t.parquet", row_group_size=3)
    table, bad = score(tmp_path / "t.parquet", model)
    assert table.row.tolist() == [0, 2, 3] and table.label.tolist() == ["Mars", "Neptune", "Mars"]
    assert bad == {1: "empty", 4: "unreadable", 5: "empty", 6: "unreadable"}


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary()), "struct", "fixed"]
)
def test_contents_of_every_type(kind: pa.DataType | str, model: Predictor, tmp_path: Path) -> None:
    contents = [MARS, None, NEPTUNE, MARS]
    column = pa.array([c and {"bytes": c, "path": "shared.jpg"} for c in contents]) if kind == "struct" else None
    if kind == "fixed":
        padded = [c and c.ljust(50_000, b"\0") for c in contents]
        column = pa.array(padded, pa.binary(50_000))
    column = pa.array(contents).cast(kind) if column is None else column
    pq.write_table(pa.table({"image": column}), tmp_path / "t.parquet")
    table, bad = score(tmp_path / "t.parquet", model)
    assert table.label.tolist() == ["Mars", "Neptune", "Mars"] and table.row.tolist() == [0, 2, 3], bad
    assert bad == {1: "empty"}


def test_rows_that_share_a_path_are_joined_by_their_row(model: Predictor, tmp_path: Path) -> None:
    given = pa.table({"path": ["x.jpg"] * 4, "image": [MARS, b"no", NEPTUNE, MARS], "id": [7, 8, 9, 10]})
    pq.write_table(given, tmp_path / "t.parquet")
    table, bad = score(tmp_path / "t.parquet", model)
    joined = given.to_pandas().join(table.set_index("row").label)
    assert joined.label.fillna("").tolist() == ["Mars", "", "Neptune", "Mars"] and bad == {1: "not_an_image"}


def test_types_that_hold_no_pictures(files: list[str], model: Predictor, tmp_path: Path) -> None:
    tables = [pa.table({"path": [[f] for f in files]}), pa.table({"image": [[1, 2]]}), pa.table({"path": [1, 2]})]
    tables.append(pa.Table.from_arrays([pa.array(files)] * 2, names=["path", "path"]))
    tables.append(pa.table({f"c{i}": [1] for i in range(2000)}))
    for i, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{i}.parquet")
        for column in (None, table.schema.names[0]):
            with pytest.raises(CelestialError) as caught:
                batch(f"{tmp_path}/{i}.parquet", tmp_path / "scores", model, column=column)
            assert caught.value.exit_code == 2 and len(str(caught.value)) < 1000


def test_names_with_characters_of_a_pattern(files: list[str], model: Predictor, tmp_path: Path) -> None:
    for name in ("dir[1].parquet", "what?.parquet", "all*.parquet"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"path": files}), tmp_path / name / "part[0].parquet")
        assert len(score(tmp_path / name, model)[0]) == 2
    assert len(score(tmp_path / "dir[1].parquet/part[0].parquet", model)[0]) == 2


@pytest.mark.parametrize("column", ["path", "image", "packed"])
def test_a_cell_of_gigabytes_by_dictionary(column: str, model: Predictor, tmp_path: Path) -> None:
    value = np.random.default_rng(0).bytes(1000).hex().encode() * 20_000  # 40 MB
    few = [value, MARS] if column != "path" else [value, b"nowhere.jpg"]
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 40 + [1], pa.int32()), pa.array(few, pa.binary()))
    if column == "packed":
        shared = pa.StructArray.from_arrays([shared], names=["bytes"])
    pq.write_table(pa.table({column.replace("packed", "image"): shared}), tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 5_000_000
    code, said, megabytes = command(tmp_path / "t.parquet", tmp_path / "out", model)
    assert code == (1 if column == "path" else 0) and megabytes < 900, (said, megabytes)
    bad = places(tmp_path / "out").bad.read_text().splitlines()
    assert len(bad) + len(pd.read_parquet(tmp_path / "out")) == 41


def test_a_row_group_that_is_a_bomb(model: Predictor, tmp_path: Path) -> None:
    schema = pa.schema({"image": pa.binary()})
    with pq.ParquetWriter(tmp_path / "t.parquet", schema, compression="zstd", use_dictionary=False) as writer:
        for contents in ([MARS], [bytes(60_000_000)] * 5, [NEPTUNE]):
            writer.write_table(pa.table({"image": contents}, schema))
    code, said, megabytes = command(tmp_path / "t.parquet", tmp_path / "out", model)
    assert code == 0 and megabytes < 500, (said, megabytes)
    assert pd.read_parquet(tmp_path / "out").row.tolist() == [0, 6]


def test_broken_tables(files: list[str], model: Predictor, tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": files * 2000}), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    huge = whole[:-8] + (1 << 30).to_bytes(4, "little") + b"PAR1"
    for wrong in (whole[:-9], whole[: len(whole) // 2], huge, whole[:-4] + b"PARE", b"PAR1" + whole[-8:]):
        (tmp_path / "t.parquet").write_bytes(wrong)
        with pytest.raises(CelestialError) as caught:
            batch(f"{tmp_path}/t.parquet", tmp_path / "scores", model)
        assert caught.value.exit_code == 2


# -- lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_lists_in_every_coding(coding: str, files: list[str], model: Predictor, tmp_path: Path) -> None:
    text = f"{files[0]}\r\n\r\n# a comment\r\nb.png\r\nb.png\r\nnowhere.jpg\r\nC:\\b.png\r\nfile://{files[1]}\r\n"
    (tmp_path / "list.txt").write_bytes(text.encode(coding))
    if coding == "utf-16-le":  # without a mark it isn't known; every line is bad, and none is left out
        with pytest.raises(AssertionError):
            assert score(tmp_path / "list.txt", model)[1] == {}
        return
    table, bad = score(tmp_path / "list.txt", model)
    assert table.label.tolist() == ["Mars", "Neptune", "Neptune", "Neptune"]
    assert bad == {3: "unreadable", 4: "unreadable"}


def test_a_list_of_what_isnt_a_file(
    files: list[str], model: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with (tmp_path / "long.jpg").open("wb") as file:
        file.truncate(1 << 40)
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("socket.jpg")
    names = ["fifo.jpg", "folder.jpg", "dangling.jpg", "loop.jpg", "socket.jpg", "long.jpg", "list.txt"]
    names += [
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "a\0.jpg",
        "n" * 300,
        "~nobody/a.jpg",
        "file:///dev/zero",
        "~a\0.jpg",
    ]
    names += ["dir::memory://a", "nosuch://a", "://", "zip://a.jpg::/dev/zero", "tar://a.jpg::nowhere.tar", "x" * 9000]
    (tmp_path / "list.txt").write_text("\n".join([*names, files[0]]))
    began = time.monotonic()
    table, bad = score(tmp_path / "list.txt", model)
    assert table.row.tolist() == [len(names)] and time.monotonic() - began < 10
    assert {names[row]: code for row, code in bad.items() if code != "unreadable"} == {
        "long.jpg": "too_large",
        "list.txt": "not_an_image",
    }


def test_a_line_of_half_a_gigabyte(files: list[str], model: Predictor, tmp_path: Path) -> None:
    with (tmp_path / "list.txt").open("wb") as file:
        file.write(f"{files[0]}\n".encode())
        file.truncate(500_000_000)
        file.seek(500_000_000)
        file.write(f"\n{files[1]}\n".encode())
    code, said, megabytes = command(tmp_path / "list.txt", tmp_path / "out", model, gigabytes=2)
    assert code == 0 and megabytes < 300, (said, megabytes)
    assert pd.read_parquet(tmp_path / "out").row.tolist() == [0, 2]


@pytest.mark.parametrize("name", ["x.jpg", "x.tar", "x.zip", "x.parquet", "x.txt", "x.csv", "x"])
def test_sources_that_arent_files(name: str, model: Predictor, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    code, said, _ = command(tmp_path / name, tmp_path / "out", model)
    assert code == (1 if name == "x.jpg" else 2) and "Traceback" not in said, said
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    code, said, _ = command(tmp_path / name, tmp_path / "out-2", model)
    assert code == (1 if name == "x.jpg" else 2) and "Traceback" not in said, said


def test_a_folder(model: Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "in.jpg").mkdir(parents=True)
    (folder / "in.jpg/a.png").write_bytes(MARS)
    (folder / "._a.png").write_bytes(MARS)
    os.mkfifo(folder / "fifo.png")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to("nowhere")
    code, said, _ = command(folder, tmp_path / "out", model, "--json")
    assert code == 0, said
    finished = read_json(places(tmp_path / "out").job)["finished"]
    assert finished["items"] == 1 and sum(finished["passed_over"].values()) == 4


# -- any exception ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TypeError, MemoryError, RecursionError, KeyError, AssertionError, SystemError])
def test_an_exception_becomes_a_row_of_bad_jsonl(
    error: type, model: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from celestial_ml.batch import scoring

    decode = scoring.decode_image

    def decoder(content: bytes, name: str, **options: object) -> np.ndarray:
        if name.endswith("1.png"):
            raise error
        return decode(content, name, **options)

    monkeypatch.setattr(scoring, "decode_image", decoder)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(MARS)
    table, bad = score(tmp_path, model)
    assert table.row.tolist() == [0, 2] and list(bad) == [1]


@pytest.mark.slow
def test_a_picture_that_ends_dasks_workers(tmp_path: Path, model: Predictor) -> None:
    import dask

    from celestial_ml.batch.dask_cluster import dask_cluster

    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(MARS)
    code = "import os, celestial_ml.batch.scoring as b; b.real = getattr(b, 'real', b.decode_image)\n"
    code += "b.decode_image = lambda c, n, **o: os._exit(1) if n.endswith('1.png') else b.real(c, n, **o)\n"
    (tmp_path / "preload.py").write_text(code)
    with dask.config.set({"distributed.worker.preload": [str(tmp_path / "preload.py")]}):
        result = batch(str(tmp_path), tmp_path / "scores", model, dask_cluster(model, workers=1))
    assert bad_of(result) == {1: "crashed"} and result.rows == 2, result.where.bad.read_text()


# -- URLs ---------------------------------------------------------------------------------------------------------


class Hostile(http.server.BaseHTTPRequestHandler):
    "A server of which every path is another trap."

    bomb = b""  # 300 MB of zeros, packed

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2].partition(".")[0]
        if name in ("404", "500"):
            self.send_error(int(name))
        elif name in ("loop", "disk"):
            self.answer(302, Location="/loop.jpg" if name == "loop" else "file:///etc/passwd")
        elif name == "gzip":
            self.answer(200, **{"Content-Encoding": "gzip"})
            self.wfile.write(self.bomb)
        elif name == "page":
            self.answer(200)
            self.wfile.write(b"<html>no picture</html>")
        elif name == "half":
            self.answer(200, **{"Content-Length": "100000"})
            self.wfile.write(MARS[:200])
        elif name == "head":
            self.forever(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.1)
        elif name == "slow":
            self.answer(200)
            self.forever(b"", b"x", 0.1)
        elif name == "endless":
            self.answer(200)
            self.forever(b"", bytes(1 << 20), 0)
        elif name == "good":
            self.answer(200)
            self.wfile.write(NEPTUNE)

    def answer(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def forever(self, begin: bytes, more: bytes, pause: float) -> None:
        try:
            self.wfile.write(begin)
            while True:
                self.wfile.write(more)
                time.sleep(pause)
        except OSError:  # the client has gone
            pass

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    Hostile.bomb = gzip.compress(bytes(300_000_000), 1)
    with web_server(Hostile) as url:
        yield url


def test_a_list_of_hostile_urls(web: str, model: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELESTIAL_URL_SECONDS", "3")
    names = ["404", "500", "loop", "disk", "page", "half", "head", "slow", "endless", "gzip", "good"]
    lines = [f"{web}/{name}.jpg" for name in names] + ["http://127.0.0.1:9/a.jpg", "http://[/a.jpg", "https:///a.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    began = time.monotonic()
    code, said, megabytes = command(tmp_path / "list.txt", tmp_path / "out", model, gigabytes=6)
    assert code == 0 and megabytes < 1200 and time.monotonic() - began < 60, (said, megabytes)
    assert pd.read_parquet(tmp_path / "out").row.tolist() == [names.index("good")]
    codes = [json.loads(line)["code"] for line in places(tmp_path / "out").bad.read_text().splitlines()]
    assert len(codes) == len(lines) - 1 and codes.count("too_large") == 2 and codes.count("not_an_image") == 1


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip", "parquet", "txt", "jpg"])
@pytest.mark.parametrize("name", ["404", "loop", "slow", "head"])
def test_a_hostile_url_as_the_source(name: str, suffix: str, web: str, model: Predictor, tmp_path: Path) -> None:
    began = time.monotonic()
    try:
        result = batch(f"{web}/{name}.{suffix}", tmp_path / "out", model)
        assert suffix in ("jpg", "txt") and result.rows == 0
    except CelestialError as e:
        assert e.exit_code == 2 and suffix != "jpg"
    assert time.monotonic() - began < 8


def test_an_endless_list(web: str, model: Predictor, tmp_path: Path) -> None:
    code, said, megabytes = command(f"{web}/endless.txt", tmp_path / "out", model)
    assert code == 2 and megabytes < 300, (code, said, megabytes)


def test_a_web_server_has_no_folders(web: str, model: Predictor, tmp_path: Path) -> None:
    with pytest.raises(CelestialError):
        batch(f"{web}/photos/", tmp_path / "out", model)


# -- what was begun by others -------------------------------------------------------------------------------------


def test_a_job_of_an_older_version(model: Predictor, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(MARS)
    where = batch(str(tmp_path / "in"), tmp_path / "out", model).where
    job = {key: value for key, value in read_json(where.job).items() if key != "columns"}
    where.job.write_text(json.dumps(job))
    with pytest.raises(CelestialError) as caught:
        batch(str(tmp_path / "in"), tmp_path / "out", model)
    assert "--restart" in caught.value.hint
    assert batch(str(tmp_path / "in"), tmp_path / "out", model, restart=True).rows == 1
