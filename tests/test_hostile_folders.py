"Folders and names as people have them: leftovers, links, loops, pipes, other kinds, other encodings, splits made before."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from serving import tiny_model
from typer.testing import CliRunner

from celestial_ml.cli.app import app
from celestial_ml.core.errors import CelestialError
from celestial_ml.core.names import check_class, check_name, printable
from celestial_ml.core.page_builder import Page
from celestial_ml.core.params import Check, Data
from celestial_ml.data.catalog import image_files, make_catalog, split_folders, with_split
from celestial_ml.data.checks import run_checks
from celestial_ml.data.images import find_pictures
from celestial_ml.data.sources import make_data_set
from celestial_ml.flow.freshness import folder_checksum
from celestial_ml.flow.steps import run_folder
from celestial_ml.registry.gate import Rule, Verdict, rules_table
from celestial_ml.workbench.new_project import new_project, package_name


def test_rows_of_a_metadata_table_without_a_name_are_left_out(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", count=2)
    (folder / "metadata.csv").write_text("file_name,weight\ncat/0.png,3\n,\n,7\n")
    assert make_catalog(folder).weight.dropna().tolist() == [3]
    (folder / "metadata.csv").write_text("file_name,weight\n,1\n,2\n")
    assert make_catalog(folder).weight.isna().all()


LATIN = os.fsdecode("Zürich.png".encode("latin-1"))


def picture(path: Path, seed: int = 0, kind: str = "PNG") -> Path:
    "A small picture, different for every seed."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path, kind)
    return path


def fill(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 8, first: int = 0) -> Path:
    "Folders of classes with pictures."
    for i, label in enumerate(classes):
        for n in range(count):
            picture(folder / label / f"{n}.png", first + 100 * i + n)
    return folder


def celestial(*arguments: object) -> "tuple[int, str, str]":
    "Exit code, standard output and standard error of a command."
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def finding(out: str, check: str) -> dict:
    return next(row for row in json.loads(out) if row["check"] == check)


def hostile(folder: Path) -> dict[str, int]:
    "Put every kind of trouble into a folder of cats and dogs; what is to be passed over, by reason."
    for name in ("cat/._0.png", "cat/@eaDir/0.png/SYNOPHOTO.png", "__MACOSX/cat/._0.png", ".ipynb_checkpoints/0.png"):
        picture(folder / name)
    for name in ("cat/Thumbs.db", "desktop.ini", ".DS_Store", "dog/half.png.crdownload", "lost+found/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not ours")
    picture(folder / "cat/one.bmp", kind="BMP")
    picture(folder / "cat/one.GIF", kind="GIF")
    (folder / "dog/live.heic").write_bytes(b"ftypheic")
    picture(folder / "dog/none", 5, "JPEG")
    picture(folder / "beside.png", 6)
    (folder / "fish").mkdir()
    os.mkfifo(folder / "cat/pipe.png")
    (folder / "cat/gone.png").symlink_to("nowhere.png")
    (folder / "cat/self.png").symlink_to("self.png")
    (folder / "cat/round").symlink_to("..")
    (folder / "all").symlink_to(".")
    return {
        "leftover": 9, ".bmp": 1, ".gif": 1, ".heic": 1, "no_suffix": 1, "no_class": 1, "empty_class": 1,
        "not_a_file": 1, "dangling_link": 2, "link_again": 2,
    }  # fmt: skip


def test_data_check_lists_ignored_files_and_why(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos")
    expected = hostile(folder)
    code, out, _ = celestial("data", "check", folder, "--json")
    seen = finding(out, "passed_over")
    assert code == 0 and seen["status"] == "warn" and seen["counts"] == expected
    assert finding(out, "readable")["status"] == "pass"
    code, out, _ = celestial("data", "check", folder)
    assert code == 0 and "1 .heic" in out and "9 left by another system" in out


def test_a_file_of_a_terabyte_is_refused_unread(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", count=2)
    with picture(folder / "cat/0.png").open("r+b") as file:
        file.truncate(1 << 40)  # zeros, which take no room on the disk
    assert make_catalog(folder).error.dropna().tolist() == ["too_large"]
    model = tiny_model(tmp_path / "model")
    code, out, err = celestial("predict", folder, "--model", model, "--json")
    assert code == 2 and len(out.splitlines()) == 3 and err.count("error: ") == 1 and "cat/0.png" in err


def test_other_suffixes_of_jpeg_and_linked_folders_are_read(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos")
    for n, suffix in enumerate((".jfif", ".JPE", ".pjpeg", ".pjp", ".JPEG")):
        picture(folder / f"cat/camera{suffix}", 50 + n, "JPEG")
    fill(tmp_path / "elsewhere", ("wolf", "more"), 3, first=1000)
    (folder / "wolf").symlink_to(tmp_path / "elsewhere/wolf")
    (folder / "dog/more").symlink_to(tmp_path / "elsewhere/more")
    catalog = make_catalog(folder)
    assert catalog.label.value_counts().to_dict() == {"cat": 13, "dog": 11, "wolf": 3} and catalog.error.isna().all()
    before = folder_checksum(folder)
    picture(tmp_path / "elsewhere/more/new.png", 7)
    assert folder_checksum(folder) != before, "a run sees a change behind a link"


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    "Twelve folders, each with links to all: as a tree of paths it has 12! leaves."
    for i in range(12):
        picture(tmp_path / f"photos/{i:02}/{i}.png", i)
        for j in range(12):
            (tmp_path / f"photos/{i:02}/to-{j}").symlink_to(tmp_path / f"photos/{j:02}")
    assert len(list(find_pictures(tmp_path / "photos"))) == 12


def test_a_deep_folder_is_walked(tmp_path: Path) -> None:
    "1,200 folders in each other have a path that no system call takes; it's counted, nothing is raised."
    folder, deep = fill(tmp_path / "photos"), os.open(tmp_path / "photos/cat", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("abcd", dir_fd=deep)
        deep, above = os.open("abcd", os.O_RDONLY, dir_fd=deep), deep
        os.close(above)
    os.close(deep)
    assert make_catalog(folder).attrs["passed_over"] == {"unreadable": 1}
    subprocess.run(["rm", "-rf", folder / "cat/abcd"], check=True)


def test_an_unreadable_folder_is_named_and_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scan = fill(tmp_path / "photos"), os.scandir
    fill(folder, ("cat/locked",), 3, first=900)

    def refuse(path):  # root may read everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    code, out, _ = celestial("data", "check", folder, "--json")
    seen = finding(out, "passed_over")
    assert code == 0 and seen["status"] == "warn" and seen["counts"] == {"unreadable": 1}
    assert seen["images"] == [str(folder / "cat/locked")]


def test_an_unreadable_picture_gets_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = fill(tmp_path / "photos"), os.open

    def refuse(path, *arguments, **options):
        if Path(os.fsdecode(path)).name == "3.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert make_catalog(folder).error.value_counts().to_dict() == {"unreadable": 2}
    code, out, _ = celestial("data", "check", folder, "--json")
    assert code == 1 and "2 unreadable" in finding(out.splitlines()[0], "readable")["saw"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos")
    picture(folder / "cat" / LATIN, 77)
    (folder / "dog" / os.fsdecode(b"\xe9.heic")).touch()
    code, out, _ = celestial("data", "check", folder, "--json")
    readable = finding(out, "readable")
    assert code == 1 and readable["images"][0].endswith(r"cat/Z\xfcrich.png") and "1 bad_name" in readable["saw"]
    catalog = with_split(make_catalog(folder), Data(), 7)
    catalog.to_parquet(tmp_path / "catalog.parquet")
    kept = pd.read_parquet(tmp_path / "catalog.parquet")
    assert kept.attrs == catalog.attrs and kept.attrs["passed_over"] == {".heic": 1}
    assert [f.counts for f in run_checks(kept, Check()) if f.check == "passed_over"] == [{".heic": 1}]
    assert len(folder_checksum(folder)) == 64

    (folder / LATIN).mkdir()
    picture(folder / LATIN / "0.png")
    code, out, err = celestial("data", "check", folder)
    assert code == 2 and r"'Z\xfcrich.png' can't be the name of a class" in err


def test_a_folder_whose_own_path_is_not_utf8(tmp_path: Path) -> None:
    folder = fill(tmp_path / LATIN, count=2)
    for command in (("data", "check", folder), ("data", "show", folder), ("new", tmp_path / "pets", "--data", folder)):
        code, _, err = celestial(*command)
        assert code == 2 and r"Z\xfcrich.png" in err and "UTF-8" in err, command


def test_composed_and_decomposed_are_one_class(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", ("caf\u00e9", "cafe\u0301", "Cat", "cat", "<b>, \"q\" & 'it''s' 🐈"))
    catalog = with_split(make_catalog(folder, folder), Data(), 7)
    assert catalog.label.value_counts()["café"] == 16 and catalog.label.nunique() == 4
    assert all((folder / path).is_file() for path in catalog.path), "the disk keeps its bytes"
    checks = {f.check: f for f in run_checks(catalog, Check())}
    assert checks["distinct_names"].status == "warn" and "Cat, cat" in checks["distinct_names"].saw
    (folder / "metadata.csv").write_text("file_name,weight\ncafe\u0301/0.png,1\nCat/1.png,2\n", encoding="utf-8")
    assert make_catalog(folder).weight.notna().sum() == 3, "both forms of a name join"


@pytest.mark.parametrize(
    "content",
    ["weight,width\n", "file_name,label\ncat/9.png,cow\n", "file_name,w\ncat/0.png,1\ncat/0.png,2\n", "", b"file_name\n\xff\xfe"],
)  # fmt: skip
def test_metadata_that_cannot_be_joined_is_an_error(tmp_path: Path, content: str | bytes) -> None:
    folder = fill(tmp_path / "photos", count=2)
    (folder / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = celestial("data", "check", folder)
    assert code == 2 and "metadata.csv" in err


@pytest.mark.parametrize("label", ["unknown", "Unknown", " ", "cat\n", "exe\u202egpj", "x" * 201])
def test_classes_that_are_refused(tmp_path: Path, label: str) -> None:
    folder = fill(tmp_path / "photos", ("dog", label), 2)
    code, _, err = celestial("data", "check", folder)
    assert code == 2 and "can't be the name of a class" in err and "\u202e" not in err
    with pytest.raises(CelestialError):
        check_class(label)


def test_an_existing_split_is_used(tmp_path: Path) -> None:
    for first, part in enumerate(("Train", "VALIDATION", "test")):
        fill(tmp_path / "photos" / part, count=6, first=1000 * first)
    folder = tmp_path / "photos"
    picture(folder / "test/stray.png", 3)
    assert split_folders(folder) == {"Train": "train", "VALIDATION": "val", "test": "test"}
    code, out, _ = celestial("data", "check", folder, "--json")
    assert code == 0 and "2 classes" in finding(out, "enough_classes")["saw"]
    assert finding(out, "passed_over")["counts"] == {"no_class": 1}
    data = Data(source="folder", folder=str(folder))
    kept = make_data_set(data, 7, tmp_path, tmp_path)
    assert kept.attrs["split_by"] == "folders" and kept.split.value_counts().to_dict() == {
        "train": 12,
        "val": 12,
        "test": 12,
    }
    assert all(kept[kept.split == "test"].path.str.contains("/test/")) or all(
        kept[kept.split == "test"].path.str.startswith("photos/test")
    )
    pooled = make_data_set(data.model_copy(update={"split": "stratified"}), 7, tmp_path, tmp_path)
    assert pooled.attrs["split_by"] == "stratified" and pooled.split.value_counts()["train"] > 20

    (folder / "test/cat/leak.png").write_bytes((folder / "Train/cat/0.png").read_bytes())
    code, out, _ = celestial("data", "check", folder, "--json")
    assert code == 1 and finding(out.splitlines()[0], "no_leak")["status"] == "fail"
    fill(folder / "test", ("cow",), 2)
    code, _, err = celestial("data", "check", folder)
    assert code == 2 and "cow" in err


def test_a_missing_part_of_a_split_is_taken_from_train(tmp_path: Path) -> None:
    fill(tmp_path / "a/train", count=10)
    fill(tmp_path / "a/test", count=4, first=1000)
    splits = with_split(make_catalog(tmp_path / "a"), Data(), 7).split.value_counts().to_dict()
    assert splits == {"train": 16, "val": 4, "test": 8}
    fill(tmp_path / "b/train", count=10)
    for n in range(5):  # test images whose class nobody says
        picture(tmp_path / f"b/test/{n}.png", 2000 + n)
    catalog = with_split(make_catalog(tmp_path / "b"), Data(), 7)
    assert set(catalog.label) == {"cat", "dog"} and catalog.attrs["passed_over"] == {"no_class": 5}
    assert catalog.split.value_counts().to_dict() == {"train": 12, "val": 4, "test": 4}


def test_folders_that_only_look_like_a_split(tmp_path: Path) -> None:
    fill(tmp_path / "vehicles", ("train", "bus", "test"))
    assert split_folders(tmp_path / "vehicles") == {} and set(image_files(tmp_path / "vehicles")) == {
        "train",
        "bus",
        "test",
    }
    fill(tmp_path / "alone/train")
    assert split_folders(tmp_path / "alone") == {}
    fill(tmp_path / "flat", ("train", "test"))
    code, _, err = celestial("data", "check", tmp_path / "flat")
    assert code == 2 and "no class folders" in err
    fill(tmp_path / "plain")
    with pytest.raises(CelestialError, match="train, val and test"):
        make_data_set(Data(source="folder", folder="plain", split="folders"), 7, tmp_path, tmp_path)


def test_predict_takes_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from celestial_ml.cli.app import _images_in

    folder = fill(tmp_path / "photos", count=2)
    expected = hostile(folder)
    paths, passed = _images_in([folder])
    assert [path.name for path in paths] == ["beside.png", "0.png", "1.png", "0.png", "1.png"]
    assert passed.counts["leftover"] == expected["leftover"] and passed.counts["link_again"] == 2
    for wrong in (folder / "cat/pipe.png", Path("/dev/zero"), tmp_path / "nowhere"):
        code, _, err = celestial("predict", wrong)
        assert code == 2 and err.startswith("error: "), wrong
    (tmp_path / "none").mkdir()
    (tmp_path / "none/one.heic").touch()
    code, _, err = celestial("predict", tmp_path / "none")
    assert code == 2 and "1 .heic" in err


HOSTILE_NAMES = [
    "$(touch x)", "`id`", "a;b", "it's", 'a"b', "../up", "a/../b", "-x", "..", ".hidden", "{{ run }}", "%s", "*", "a\nb", "con",
    "nul.txt", "COM1", "ends.", " ", "x" * 260, "\u202ename", os.fsdecode(b"\xfc"),
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=printable)
def test_one_rule_for_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CelestialError) as refused:
        check_name("run", name)
    assert refused.value.exit_code == 2 and refused.value.message.encode() and "\n" not in refused.value.message
    with pytest.raises(CelestialError):
        run_folder(name)
    with pytest.raises(CelestialError):
        package_name(name)
    for command in (("run", "smoke", f"--run={name}"), ("sweep", "smoke", "--grid", "seed=1,2", f"--run={name}"),
                    ("report", "--", name), ("keys", "new", "--", name)):  # fmt: skip
        code, _, err = celestial(*command)
        assert code == 2 and "can't be the name of a" in err and "Traceback" not in err, command
    if "/" not in name and name not in ("", " ") and len(name) < 255:
        monkeypatch.chdir(tmp_path)
        code, _, err = celestial("new", "--classes", "cat,dog", "--", name)
        assert code == 2 and not list(tmp_path.iterdir())


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    assert run_folder("größe") == Path("output/größe") and run_folder("sweep/lr-0.001_x~1") == Path(
        "output/sweep/lr-0.001_x~1"
    )
    for name in ("my-pets", "pets2"):
        assert package_name(name)


@pytest.mark.parametrize(
    "name", ["numpy", "NumPy", "scikit-learn", "sklearn", "pillow", "PIL", "yaml", "json", "celestial-ml"]
)
def test_a_project_does_not_take_the_name_of_a_package(name: str, tmp_path: Path) -> None:
    with pytest.raises(CelestialError, match="can't be the name of a project"):
        new_project(tmp_path / name, ["cat", "dog"])
    assert not list(tmp_path.iterdir())


def test_class_names_are_escaped_in_cards_and_in_the_gates_table() -> None:
    rule = Rule("worst class", "floor", 0.1, 0.7, False, "worst class (<b>, 'x') F1 is below")
    html = rules_table(Verdict("celestial/1", "refuse", False, (), (rule,), None, None)).to_html()
    assert "<b>" not in html and "&lt;b&gt;" in html
    data = {"title": "a class", "note": "", "remarks": [], "rows": [("<b>, 'x'", 1.0)], "plots": {}, "pictures": []}
    page = Page("example", data)
    assert r"\<b>, 'x'" in page.markdown() and "<b>, " not in page.html() and "&lt;b&gt;, " in page.html()


@pytest.mark.slow
def test_names_survive_a_whole_run(tmp_path: Path) -> None:
    "Classes of free text, in a folder with a quote in it, through training, pages and prediction."
    folder = fill(tmp_path / 'it\'s "here" & there', ("<b>, 'x'", "caf\u00e9", 'a "q" 🐈'), 12)
    root = Path(__file__).resolve().parent.parent
    root, run = Path(__file__).resolve().parent.parent, f"names-{os.getpid()}"
    code = "import sys; from celestial_ml.cli.app import main; sys.argv[0] = 'celestial'; main()"
    settings = [
        "data.source=folder",
        f"data.folder={json.dumps(str(folder))}",
        "evaluate.ood_images=4",
        "train.epochs=1",
    ]
    command = [sys.executable, "-c", code, "run", "smoke", "--run", run, *(f"--set={setting}" for setting in settings)]
    home = {"CELESTIAL_HOME": str(tmp_path / "home of 'all'")}
    try:
        done = subprocess.run(command, cwd=root, env=os.environ | home, capture_output=True, text=True)
        assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr
        about = json.loads((root / run_folder(run) / "model.json").read_text(encoding="utf-8"))
        assert about["classes"] == sorted(["<b>, 'x'", "caf\u00e9", 'a "q" 🐈'])
        for page in (root / run_folder(run)).glob("*.html"):
            assert "<b>, 'x'" not in page.read_text(encoding="utf-8"), page.name
    finally:
        shutil.rmtree(root / run_folder(run), ignore_errors=True)
