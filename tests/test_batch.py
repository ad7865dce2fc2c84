"`celestial batch`: every picture once, whatever is killed; every kind of source; the same answers everywhere."

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from programs import web_server
from serving import encoded, tiny_model
from typer.testing import CliRunner

from celestial_ml.batch.job import batch
from celestial_ml.batch.parts import OtherJob, part_files, places
from celestial_ml.cli.app import app
from celestial_ml.core.files import read_json, write_json
from celestial_ml.data.drift import describe
from celestial_ml.data.features import image_statistics
from celestial_ml.data.images import decode_image
from celestial_ml.flow.pipeline import Plan, execute, make_plan
from celestial_ml.planets.renderer import render
from celestial_ml.serve.predictor import Predictor

CELESTIAL = str(Path(sys.executable).with_name("celestial"))
COLUMNS = ["path", "label", "confidence", "known", "ood_score", "probabilities", "model_version", "sha256", "row"]
COLUMNS += ["brightness", "contrast", "sharpness"]
BAD = {"half.jpg": "damaged", "words.jpg": "not_an_image", "empty.png": "empty"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Forty good pictures of three formats and many sizes, and three bad ones."
    folder = tmp_path_factory.mktemp("photos")
    for i in range(40):
        kind = ("JPEG", "PNG", "WEBP")[i % 3]
        path = folder / f"night {i % 4}" / f"{i:02}.{kind.lower()}"
        path.parent.mkdir(exist_ok=True)
        picture = render("Mars" if i % 2 else "Neptune")[i // 8 :] // (60 if i % 10 == 7 else 1)
        path.write_bytes(encoded(picture, kind))
    (folder / "half.jpg").write_bytes(encoded(render("Mars"), "JPEG")[:900])
    (folder / "words.jpg").write_text("not a picture")
    (folder / "empty.png").touch()
    return folder


def many(folder: Path, count: int) -> Path:
    "So many small pictures of 50 kinds, of which every hundredth is bad."
    kinds = [encoded(render("Mars" if i % 2 else "Neptune", size=32)[i // 5 :], "JPEG") for i in range(50)]
    for i in range(count):
        path = folder / f"{i // 1000:03}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kinds[i % 50] if i % 100 else b"bad")
    return folder


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    "`celestial batch` as a person calls it."
    told = [CELESTIAL, "batch", *map(str, arguments)]
    return subprocess.run(told, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]


def bad_of(out: Path) -> list[dict]:
    "The lines of the side file."
    return [json.loads(line) for line in places(out).bad.read_text().splitlines()]


def assert_complete(folder: Path, out: Path) -> pd.DataFrame:
    "Every picture has a row or a line, once."
    table = pd.read_parquet(out)
    told = Counter(table.path) + Counter(bad["path"] for bad in bad_of(out))
    assert told == Counter(str(path) for path in folder.rglob("*.*"))
    return table


@pytest.mark.parametrize("name", ["scores", "scores.parquet"])
def test_the_command(name: str, photos: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    result = command(photos, out, "--model", model, "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["pictures"], said["answered"], said["bad"], said["unknown"]) == (43, 40, 3, 4)
    table = assert_complete(photos, out)
    assert list(table.columns) == COLUMNS
    assert {Path(bad["path"]).name: bad["code"] for bad in bad_of(out)} == BAD
    page = Path(said["summary"]).read_text()
    assert page.count("<img") == 28 + 4 and "28 of 36 are shown" in page and "half.jpg is damaged" in page
    assert out.is_dir() == (name == "scores") and pyarrow.dataset.dataset(out).count_rows() == 40
    again = command(photos, out, "--model", model)
    assert again.returncode == 0 and "nothing to do" in again.stderr


def test_answers_are_those_of_predict(photos: Path, model: Path, tmp_path: Path) -> None:
    assert command(photos, tmp_path / "out", "--model", model).returncode == 0
    table = pq.read_table(tmp_path / "out").select(COLUMNS[:8])  # the others `predict` has none of
    rows = {row["path"]: row for row in table.to_pylist()}
    told = subprocess.run([CELESTIAL, "predict", *rows, "--model", model, "--json"], capture_output=True, text=True)
    predicted = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(predicted) == 40 and {answer["path"]: answer for answer in predicted} == rows


def test_the_summary_says_what_differs_from_the_training_images(photos: Path, tmp_path: Path) -> None:
    "Half as bright as the training images; a package without their description says nothing."
    pictures = [decode_image(path) for path in sorted(photos.rglob("*.*")) if path.name not in BAD]
    here = np.array([[*image_statistics(picture).values()] for picture in pictures])
    folder = tiny_model(tmp_path / "model")
    about = read_json(folder / "model.json")
    for factor, drifted in ((1, []), (2, ["brightness"])):
        learned = np.concatenate([here] * 10) * [factor, 1, 1]
        write_json(folder / "model.json", about | {"statistics": describe(learned)})
        done = command(photos, tmp_path / f"out{factor}", "--model", folder, "--json")
        drift = json.loads(done.stdout)["drift"]
        assert [name for name, one in drift.items() if one["drifted"]] == drifted and len(drift) == 3
        assert drift["brightness"]["here"] == pytest.approx(here[:, 0].mean(), abs=1e-3)
    assert "drifted" in (tmp_path / "out2/_batch/summary.html").read_text()
    write_json(folder / "model.json", about)
    assert json.loads(command(photos, tmp_path / "older", "--model", folder, "--json").stdout)["drift"] == {}


def test_exit_codes(photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CELESTIAL_TERMINAL", "1")
    monkeypatch.setattr("celestial_ml.batch.dask_cluster.CONNECT_SECONDS", 0.5)
    bad, empty = tmp_path / "bad", tmp_path / "empty"
    for folder in (bad, empty):
        folder.mkdir()
    (bad / "one.jpg").write_text("no")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").touch()
    cases = {
        ("nowhere/", "a"): (2, "there is no nowhere/"),
        (empty, "b"): (2, "no picture"),
        (bad, "c"): (1, "can't be read"),
        (photos, "d", "--max-bad", "0.01"): (1, "3 of 43"),
        (photos, "e", "--engine", "spark"): (2, "threads or dask"),
        (photos, "taken"): (2, "is there already"),
        (photos, "f", "--engine", "dask", "--scheduler", "tcp://127.0.0.1:9"): (2, "no Dask scheduler"),
    }
    for arguments, (code, said) in cases.items():
        result = CliRunner().invoke(app, ["batch", *map(str, arguments), "--model", str(model)])
        assert result.exit_code == code and said in result.stderr, (arguments, result.output)


def test_another_model_or_changed_pictures_are_refused(photos: Path, model: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(photos, tmp_path / "photos")
    out = tmp_path / "out.parquet"
    batch(str(mine), out, Predictor(model))
    other = shutil.copytree(model, tmp_path / "other")
    about = read_json(other / "model.json") | {"version": "8", "ood_threshold": 100.0}
    (other / "model.json").write_text(json.dumps(about))
    with pytest.raises(OtherJob, match=r"answers of tiny/7.*not of tiny/8"):
        batch(str(mine), out, Predictor(other))
    (mine / "zz.jpg").write_bytes(encoded(render("Mars"), "JPEG"))
    with pytest.raises(OtherJob):
        batch(str(mine), out, Predictor(model))
    assert batch(str(mine), out, Predictor(other), restart=True).rows == 41
    assert set(pd.read_parquet(out).model_version) == {"tiny/8"}


def test_the_score_step_writes_an_answer_for_each_image(smoke: Plan) -> None:
    plan = make_plan(smoke.root, "smoke", until="score")
    assert list(plan.stale) == ["score"]
    execute(plan, quiet=True)
    assert not make_plan(smoke.root, "smoke", until="score").stale
    scores, catalog = (pd.read_parquet(f"output/smoke/{name}.parquet") for name in ("scores", "catalog"))
    assert scores.path.tolist() == catalog.path.tolist() and Path("output/smoke/scores.batch/summary.html").is_file()


# -- killed -------------------------------------------------------------------------------------------------------

SCORE = """
import sys
from celestial_ml.batch.job import batch
from celestial_ml.serve.predictor import Predictor
batch(sys.argv[1], sys.argv[2], Predictor(sys.argv[3]), rows=int(sys.argv[4]))
"""


def killed_and_finished(folder: Path, out: Path, model: Path, rows: int, kills: int, longest: float) -> int:
    "Kill a job so many times at random moments, then let it finish; how many of the kills met it at work."
    told = [sys.executable, "-c", SCORE, str(folder), str(out), str(model), str(rows)]
    rng, met = random.Random(7), 0
    for _ in range(kills):
        process = subprocess.Popen(told, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while not places(out).job.exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, longest))
        met += process.poll() is None
        process.kill()
        process.wait()
    last = subprocess.run(told, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    return met


@pytest.mark.parametrize("name", ["scores", "scores.parquet"])
def test_killed_at_random_moments(name: str, model: Path, tmp_path: Path) -> None:
    folder, out = many(tmp_path / "many", 1000), tmp_path / name
    assert killed_and_finished(folder, out, model, rows=64, kills=5, longest=1.5) >= 2
    table = assert_complete(folder, out)
    assert table.path.tolist() == sorted(table.path) and len(table) == 990


@pytest.mark.slow
def test_killed_thirty_times_over_20_000_pictures(model: Path, tmp_path: Path) -> None:
    folder, out = many(tmp_path / "many", 20_000), tmp_path / "scores"
    assert killed_and_finished(folder, out, model, rows=500, kills=30, longest=2.0) >= 20
    table = assert_complete(folder, out)
    assert table.path.tolist() == sorted(table.path) and len(table) == 19_800


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_keeps_what_is_scored(sign: signal.Signals, model: Path, tmp_path: Path) -> None:
    folder, out = many(tmp_path / "many", 6000), tmp_path / "scores"
    told = [CELESTIAL, "batch", str(folder), str(out), "--model", str(model), "--workers", "1"]
    process = subprocess.Popen(told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not places(out).job.exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)  # it scores
    process.send_signal(sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "finished work is kept" in said, said
    kept = sum(pq.read_metadata(path).num_rows for path in part_files(places(out)))
    assert 0 < kept < 5940
    assert command(folder, out, "--model", model).returncode == 0
    assert len(assert_complete(folder, out)) == 5940


def test_a_second_job_on_the_same_output_is_refused(model: Path, tmp_path: Path) -> None:
    folder, out = many(tmp_path / "many", 3000), tmp_path / "scores"
    told = [CELESTIAL, "batch", str(folder), str(out), "--model", str(model), "--workers", "1"]
    first = subprocess.Popen(told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not places(out).job.exists() and time.monotonic() < until:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = command(folder, out, "--model", model)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2 and "is being written, by process" in second.stderr
    assert first.wait(120) == 0
    assert_complete(folder, out)


# -- sources ------------------------------------------------------------------------------------------------------


def shard(photos: Path, path: Path, mode: str = "w") -> Path:
    "A tar file in WebDataset's layout."
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for i, picture in enumerate(sorted(p for p in photos.rglob("*.*"))):
            for suffix, content in ((picture.suffix, picture.read_bytes()), (".json", b"{}")):
                member = tarfile.TarInfo(f"{i:04}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_every_kind_of_source_gives_the_same_answers(photos: Path, model: Path, tmp_path: Path) -> None:
    files = sorted(photos.rglob("*.*"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)))
    shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
    contents = [path.read_bytes() for path in files]
    pd.DataFrame({"path": list(map(str, files))}).to_parquet(tmp_path / "paths.parquet")
    pd.DataFrame({"id": range(43), "bytes": contents}).to_parquet(tmp_path / "bytes.parquet")
    shard(photos, tmp_path / "a.tar"), shard(photos, tmp_path / "b.tar.gz", "w:gz")
    predictor = Predictor(model)
    batch(str(photos), tmp_path / "out", predictor)
    expected = (
        pd.read_parquet(tmp_path / "out").drop(columns=["path", "row"]).sort_values("sha256").reset_index(drop=True)
    )
    with web_server(tmp_path) as url:
        local = ["list.txt", "photos.zip", "paths.parquet", "bytes.parquet", "a.tar", "b.tar.gz", "*.tar"]
        given = [f"{tmp_path}/{name}" for name in local] + [f"file://{photos}", f"file://{tmp_path}/a.tar"]
        given += [f"{url}/{name}" for name in ("photos.zip", "b.tar.gz", "bytes.parquet")]
        for i, name in enumerate(given):
            result = batch(name, tmp_path / f"out-{i}", predictor)
            assert (result.rows, result.bad) == (40, 3), name
            table = pd.read_parquet(tmp_path / f"out-{i}")
            rows = table.row.tolist() + [bad["row"] for bad in bad_of(tmp_path / f"out-{i}")]
            assert sorted(rows) == list(range(43)), name
            found = table.drop(columns=["path", "row"]).sort_values("sha256").reset_index(drop=True)
            pd.testing.assert_frame_equal(found, expected, check_exact=True)
            assert table.path.is_unique


def test_a_list_on_the_standard_input(photos: Path, model: Path, tmp_path: Path) -> None:
    listed = "\n".join(str(path.relative_to(photos)) for path in sorted(photos.rglob("*.*")))
    result = command("-", tmp_path / "out", "--model", model, input=listed, cwd=photos)
    assert result.returncode == 0, result.stderr
    assert len(pd.read_parquet(tmp_path / "out")) == 40


def test_a_shard_that_ends_too_early(photos: Path, model: Path, tmp_path: Path) -> None:
    whole = shard(photos, tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    result = command(tmp_path / "a.tar", tmp_path / "out", "--model", model)
    assert result.returncode == 2 and "can be read to its end" in result.stderr
    assert 0 < len(pd.read_parquet(tmp_path / "out")) < 40, "what came before is kept"


# -- light, and flat ----------------------------------------------------------------------------------------------


def test_batch_imports_nothing_heavy(photos: Path, model: Path, tmp_path: Path) -> None:
    heavy = ("tensorflow", "keras", "mlflow", "pandas", "matplotlib", "sklearn", "distributed", "fastapi", "gradio")
    code = (
        "import sys; from celestial_ml.cli.app import app; "
        f"app({['batch', str(photos), str(tmp_path / 'out'), '--model', str(model)]!r}, standalone_mode=False); "
        f"sys.exit(' '.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def peak(folder: Path, out: Path, model: Path) -> int:
    "The most memory that the command had, in kilobytes."
    told = [CELESTIAL, "batch", str(folder), str(out), "--model", str(model)]
    process = subprocess.Popen(told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    return used.ru_maxrss


@pytest.mark.slow
def test_memory_is_flat(model: Path, tmp_path: Path) -> None:
    few, lot = many(tmp_path / "few", 1500), many(tmp_path / "lot", 30_000)
    small, large = (peak(folder, tmp_path / f"{folder.name}-out", model) for folder in (few, lot))
    assert large < 1.1 * small, f"{small / 1000:.0f} MB for 1,500 pictures, {large / 1000:.0f} MB for 30,000"


# -- a cluster ----------------------------------------------------------------------------------------------------


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    "A real scheduler and two workers on this machine, each a process that can be killed."
    dask, here = str(Path(sys.executable).with_name("dask")), ["--host", "127.0.0.1", "--no-dashboard"]
    file = folder / "scheduler.json"
    scheduler = [dask, "scheduler", *here, "--port", "0", "--scheduler-file", str(file)]
    worker = [dask, "worker", *here, "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny"]
    worker += ["--local-directory", str(folder)]
    with (folder / "log").open("w") as log:
        began = [subprocess.Popen(scheduler, stdout=log, stderr=log)]
        began += [subprocess.Popen(worker, stdout=log, stderr=log, cwd="/") for _ in range(2)]
        try:
            until = time.monotonic() + 60
            while not file.exists() and time.monotonic() < until:
                time.sleep(0.1)
            yield read_json(file)["address"], began[1:]
        finally:
            for process in began:
                process.kill()
                process.wait()


def test_a_cluster_of_which_a_worker_is_killed(model: Path, tmp_path: Path) -> None:
    from distributed import Client

    folder = many(tmp_path / "many", 4000)
    batch(str(folder), tmp_path / "here", Predictor(model))
    expected = pd.read_parquet(tmp_path / "here")
    with cluster(tmp_path) as (address, workers):
        told = [CELESTIAL, "batch", str(folder), str(tmp_path / "there"), "--model", str(model)]
        told += ["--engine", "dask", "--scheduler", address]
        with (tmp_path / "said").open("w") as said:
            process = subprocess.Popen(told, stdout=said, stderr=said)
            until = time.monotonic() + 120
            with Client(address) as client:
                while not (len(work := client.processing()) == 2 and all(work.values())) and time.monotonic() < until:
                    time.sleep(0.01)  # both workers are at work from here on
            assert process.poll() is None, "it was done before a worker could be killed"
            workers[0].kill()
            assert process.wait(240) == 0, (tmp_path / "said").read_text()
        assert workers[1].poll() is None
    found = assert_complete(folder, tmp_path / "there")
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert np.array_equal(
        [b["path"] for b in bad_of(tmp_path / "there")], [b["path"] for b in bad_of(tmp_path / "here")]
    )
