"Labels in a table, as people have them: written by any spreadsheet, beside any folder; what is wrong names its row."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from celestial_ml.cli.app import data_app
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.params import Data
from celestial_ml.data.catalog import image_files, make_catalog, with_split
from celestial_ml.data.sources import make_data_set, production_catalog
from celestial_ml.flow.pipeline import make_plan
from celestial_ml.workbench.new_project import new_project

COMMAND, ROOT = Path(sys.executable).with_name("celestial"), Path(__file__).resolve().parents[1]


def flat(folder: Path, count: int = 24) -> Path:
    "Numbered pictures in one folder."
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 255, (24, 24, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{n}.png")
    return folder


def celestial(*arguments: object, folder: Path = ROOT) -> "tuple[int, str, str]":
    "Exit code, standard output and standard error of a command."
    # Neither the environment nor the folder of tests that ran before
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_"))}
    result = subprocess.run([COMMAND, *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def table(head: str = "file_name,label", separator: str = ",", count: int = 24) -> str:
    "Cats and dogs in turn."
    return "\n".join([head, *(f"{n}.png{separator}{'dog' if n % 2 else 'cat'}" for n in range(count))]) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "metadata.csv": table().encode(),
        "capitals": table("File_Name,Label").encode(),
        "other names": table("path,class").encode(),
        "semicolons, as a spreadsheet in Europe": table("file;label", ";").encode(),
        "tabs, UTF-16": table("file\tlabel", "\t").encode("utf-16"),
        "bars": table("file|label", "|").encode(),
        "a mark at the beginning, lines of Windows": table().replace("\n", "\r\n").encode("utf-8-sig"),
        "quotes": b'"file_name","label"\n' + b"".join(b'"%d.png" , "%s"\n'.replace(b" ", b"") % (n, b"dog" if n % 2 else b"cat") for n in range(24)),
        "without suffixes": table().replace(".png", "").encode(),
        "backslashes": table().replace(".png", ".png").replace("\n", "\n.\\").removesuffix(".\\").replace(".\\file", "file").encode(),
        "rows of nothing": (table() + ",\n,\n").encode(),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_tables_that_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    folder = flat(tmp_path / "photos")
    path = folder / "metadata.csv" if name == "metadata.csv" else tmp_path / "labels.csv"
    path.write_bytes(content)
    catalog = make_catalog(folder, labels=None if path.parent == folder else path)
    assert catalog.label.value_counts().to_dict() == {"cat": 12, "dog": 12} and catalog.error.isna().all()
    assert all(
        (int(Path(p).stem) % 2 == 1) == (label == "dog") for p, label in zip(catalog.path, catalog.label, strict=True)
    )


def test_json_lines_and_a_split(tmp_path: Path) -> None:
    folder = flat(tmp_path / "photos")
    parts = ["train"] * 16 + ["validation"] * 4 + ["Test"] * 4
    lines = [{"file_name": f"{n}.png", "label": n % 2, "split": part, "boxes": [1, 2]} for n, part in enumerate(parts)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    catalog = with_split(make_catalog(folder), Data(), 7)
    assert catalog.split.value_counts().to_dict() == {"train": 16, "val": 4, "test": 4}
    assert set(catalog.label) == {"0", "1"} and catalog.attrs["split_by"] == "folders"
    catalog.to_parquet(tmp_path / "catalog.parquet")


def test_a_table_in_each_part_as_a_hub_has_them(tmp_path: Path) -> None:
    for part in ("train", "test"):
        folder = flat(tmp_path / "photos" / part, 12)
        (folder / "metadata.csv").write_text(table(count=12))
    catalog = make_catalog(tmp_path / "photos", tmp_path)
    assert catalog.part.value_counts().to_dict() == {"train": 12, "test": 12} and set(catalog.label) == {"cat", "dog"}
    (tmp_path / "photos/train/metadata.csv").unlink()
    (tmp_path / "photos/test/metadata.csv").unlink()
    lines = "".join(f"{part}/{n}.png,{'ab'[n % 2]}\n" for part in ("train", "test") for n in range(12))
    (tmp_path / "photos/metadata.csv").write_text("file_name,label\n" + lines)
    assert make_catalog(tmp_path / "photos").part.value_counts().to_dict() == {"train": 12, "test": 12}


def test_a_split_of_class_folders_may_stand_in_a_table(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        flat(tmp_path / label, 6)
    rows = [f"{label}/{n}.png,{'test' if n > 3 else 'train'}" for label in ("cat", "dog") for n in range(6)]
    (tmp_path / "metadata.csv").write_text("file_name,split\n" + "\n".join(rows))
    assert with_split(make_catalog(tmp_path), Data(val=0.25), 7).split.value_counts().to_dict()["test"] == 4
    (tmp_path / "metadata.csv").write_text("file_name,split\n" + "\n".join(rows[1:]))
    with pytest.raises(CelestialError, match="no split"):
        make_catalog(tmp_path)


HEAD = "file_name,label,split\n0.png,cat,train\n"


@pytest.mark.parametrize(
    ("content", "said"),
    {
        "a missing file": (HEAD + "1.png,dog,train\n77.png,cat,train\n78.png,cat,train\n", "row 4.*77.png.*row 5"),
        "another kind of file": (HEAD + "one.bmp,dog,train\n", "row 3.*JPEG"),
        "outside": (HEAD + "../outside.png,dog,train\n", "row 3"),
        "no label": (HEAD + "1.png,,train\n", "row 3.*no label"),
        "no file": (HEAD + ",dog,train\n", "row 3.*no file"),
        "an odd split": (HEAD + "1.png,dog,holdout\n", "row 3.*holdout"),
        "no split": (HEAD + "1.png,dog,\n", "row 3.*no split"),
        "twice": (HEAD + "1.png,dog,train\n0.png,cat,train\n", "row 2.*twice.*row 4"),
        "twice, in two ways": (HEAD + "./0.png,cat,train\n", "row 2.*twice"),
        "under two classes": (HEAD + "0.png,dog,train\n", "row 2.*several labels"),
        "several labels": (HEAD + "1.png,cat;dog,train\n", "row 3.*several labels"),
        "several, with commas": (HEAD + '1.png,dog,train\n2.png,"cat, dog",train\n', "row 4.*several labels"),
        "the answer unknown": (HEAD + "1.png,Unknown,train\n", "row 3.*Unknown"),
        "too many cells": (HEAD + "1.png,dog, the small one,train\n", "row 3.*more cells"),
        "an open quote": (HEAD + '1.png,"dog,train\n', "line"),
        "other columns": ("picture_id,cat,dog\n0.png,1,0\n", "no column file_name"),
        "no table": ("", "no column"),
        "Latin-1": (HEAD.encode() + "1.png,Bär,train\n".encode("latin-1"), "row 3.*0xe4 is not UTF-8"),
        "half of UTF-16": ("file,label\n".encode("utf-16") + b"x", "UTF-16"),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_tables_that_are_refused_name_the_row(tmp_path: Path, content: str, said: "tuple[str | bytes, str]") -> None:
    text, expected = said
    folder = flat(tmp_path / "photos", 3)
    (folder / "one.bmp").touch()
    (tmp_path / "outside.png").write_bytes((folder / "0.png").read_bytes())
    labels = tmp_path / "labels.csv"
    labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CelestialError, match=expected):
        make_catalog(folder, labels=labels)
    (folder / "metadata.csv").write_bytes(labels.read_bytes())
    result = CliRunner().invoke(data_app, ["check", str(folder)])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_class_names_with_commas_are_names(tmp_path: Path) -> None:
    folder = flat(tmp_path, 4)
    rows = '0.png,"tench, Tinca tinca"\n1.png,"tench, Tinca tinca"\n2.png,"goldfish, Carassius"\n3.png,"goldfish, Carassius"\n'
    (folder / "metadata.csv").write_text("file_name,label\n" + rows)
    assert set(image_files(folder)) == {"tench, Tinca tinca", "goldfish, Carassius"}


def test_the_usual_column_comes_before_others(tmp_path: Path) -> None:
    folder = flat(tmp_path, 2)
    (folder / "metadata.csv").write_text("file,file_name,Label,class,label\nx,0.png,cat,1,2\ny,1.png,dog,3,4\n")
    catalog = make_catalog(folder)
    assert list(catalog.label) == ["cat", "dog"] and catalog["class"].tolist() == [1, 3]


def test_two_tables_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = flat(tmp_path, 2)
    (folder / "metadata.csv").write_text(table(count=2))
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "label": "cat"}')
    with pytest.raises(CelestialError, match="both"):
        make_catalog(folder)


def test_pictures_without_a_row_are_counted(tmp_path: Path) -> None:
    folder = flat(tmp_path / "photos")
    (folder / "metadata.csv").write_text(table(count=20))
    code, out, _ = celestial("data", "check", folder, "--json")
    seen = next(row for row in json.loads(out) if row["check"] == "passed_over")
    assert code == 0 and seen["status"] == "warn" and seen["counts"]["no_label"] == 4


def test_a_run_sees_a_changed_table(tmp_path: Path) -> None:
    flat(tmp_path / "photos")
    (tmp_path / "labels.csv").write_text(table())
    data = Data(source="folder", folder="photos", labels="labels.csv")
    catalog = make_data_set(data, 7, tmp_path, tmp_path)
    assert set(catalog.split) == {"train", "val", "test"} and catalog.path[0].startswith("photos/")
    root = Path(__file__).resolve().parent.parent
    settings = [
        f"data.{key}={json.dumps(str(tmp_path / value))}"
        for key, value in (("folder", "photos"), ("labels", "labels.csv"))
    ]
    before = make_plan(root, "smoke", ["data.source=folder", *settings]).inputs["acquire"]["images"]
    (tmp_path / "labels.csv").write_text(table(count=22))
    assert make_plan(root, "smoke", ["data.source=folder", *settings]).inputs["acquire"]["images"] != before
    with pytest.raises(CelestialError, match="isn't folder"):
        make_data_set(Data(labels="labels.csv"), 7, tmp_path, tmp_path)


@pytest.mark.parametrize("kind", ["class folders", "table", "loose"])
def test_a_second_folder_with_and_without_labels(tmp_path: Path, kind: str) -> None:
    folder = flat(tmp_path / "asked", 4)
    if kind == "class folders":
        for n in range(4):
            (folder / "cat").mkdir(exist_ok=True)
            (folder / f"{n}.png").rename(folder / f"cat/{n}.png")
    elif kind == "table":
        (folder / "metadata.csv").write_text(table(count=4))
    (folder / ("cat" if kind == "class folders" else "") / "9.png").write_text("no picture")
    data = Data(source="folder", folder="photos", test_folder="asked")
    catalog = production_catalog(data, tmp_path)
    assert set(catalog.label) == {"class folders": {"cat"}, "table": {"cat", "dog"}, "loose": {""}}[kind]
    assert len(catalog) == (4 if kind == "table" else 5) and catalog.error.notna().sum() == (kind != "table")
    flat(tmp_path / "photos/cat", 8)
    flat(tmp_path / "photos/dog", 8)
    assert not make_data_set(data, 7, tmp_path, tmp_path).path.str.startswith("asked").any(), "none is learned from"
    root, settings = Path(__file__).resolve().parent.parent, [f"data.folder={json.dumps(str(tmp_path / 'photos'))}"]
    settings += ["data.source=folder", f"data.test_folder={json.dumps(str(folder))}"]
    before = make_plan(root, "smoke", settings).inputs["acquire"]["images"]
    (folder / "new.png").write_bytes(b"one more")
    assert make_plan(root, "smoke", settings).inputs["acquire"]["images"] != before
    with pytest.raises(CelestialError, match="test_folder"):
        make_plan(root, "smoke", [*settings[:-1], "data.test_folder=nowhere-at-all"])


def test_the_commands_take_a_table(tmp_path: Path) -> None:
    flat(tmp_path / "photos")
    (tmp_path / "photos/labels.csv").write_text(table())
    code, out, _ = celestial("data", "check", tmp_path / "photos/labels.csv", "--json")
    assert code == 0 and "2 classes" in out
    assert celestial("data", "show", tmp_path / "photos/labels.csv", "--output", tmp_path / "sheet.png")[0] == 0
    code, out, err = celestial("new", tmp_path / "pets", "--data", tmp_path / "photos/labels.csv", "--json")
    assert code == 0 and json.loads(out)["classes"] == ["cat", "dog"], err


@pytest.mark.parametrize("kind", ["metadata.csv", "labels.csv"])
def test_a_new_project_of_a_table(tmp_path: Path, kind: str) -> None:
    folder = flat(tmp_path / "photos")
    (folder / kind).write_text(table())
    data = folder if kind == "metadata.csv" else folder / kind
    assert new_project(tmp_path / "pets", data=data) == ["cat", "dog"]
    before = Path.cwd()
    os.chdir(tmp_path / "pets")
    try:
        code, out, err = celestial("data", "check", "--json", folder=Path.cwd())
    finally:
        os.chdir(before)
    assert code == 0 and "2 classes" in out, err
    with pytest.raises(CelestialError, match="differ"):
        new_project(tmp_path / "more", ["cat", "cow"], data)
