"Splits: as they always were by default, stable while a set grows, groups that are never torn apart, and tables of splits."

import hashlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from celestial_ml.core.errors import CelestialError
from celestial_ml.core.files import write_json
from celestial_ml.core.params import Data
from celestial_ml.data.catalog import stable_split, stratified_split, with_split
from celestial_ml.data.sources import make_data_set
from celestial_ml.planets.renderer import render_many


def as_it_was(catalog: pd.DataFrame, val: float, test: float, seed: int) -> pd.Series:
    "The rule of all results until now: the first of every class, in the order of their hashes."
    split = pd.Series("train", index=catalog.index)
    for _, rows in catalog.groupby("label"):
        order = sorted(rows.sha256.unique(), key=lambda sha: hashlib.sha256(f"{seed}:{sha}".encode()).digest())
        n_test, n_val = (max(round(len(order) * share), share > 0 and len(order) > 2) for share in (test, val))
        split[rows.index[rows.sha256.isin(order[:n_test])]] = "test"
        split[rows.index[rows.sha256.isin(order[n_test : n_test + n_val])]] = "val"
    return split


def test_the_default_split_is_that_of_all_earlier_results() -> None:
    rng = np.random.default_rng(0)
    for trial in range(60):
        count = int(rng.integers(1, 80))
        shas = rng.integers(0, max(2, count * 3 // 4), count).astype(str)  # some are there twice
        catalog = pd.DataFrame({"sha256": shas, "label": rng.choice(["cat", "dog", "cow"], count)})
        val, test = rng.choice([0, 0.1, 0.15, 0.25, 0.5], 2)
        assert stratified_split(catalog, val, test, trial).equals(as_it_was(catalog, val, test, trial))


def test_a_stable_split_stays_while_images_are_added() -> None:
    shas = pd.Series([hashlib.sha256(str(i).encode()).hexdigest() for i in range(5000)])
    whole = stable_split(shas, 0.15, 0.2, 7)
    assert whole.value_counts(normalize=True).to_dict() == pytest.approx(
        {"train": 0.65, "test": 0.2, "val": 0.15}, abs=0.02
    )
    for count in (1, 10, 500, 4999):
        assert stable_split(shas[:count], 0.15, 0.2, 7).equals(whole[:count])
    classes = pd.DataFrame({"sha256": shas, "label": ["cat", "dog"] * 2500})
    before, after = (stratified_split(rows, 0.15, 0.2, 7) for rows in (classes[:2000], classes))
    assert 0 < (before != after[:2000]).mean() < 0.05, "why there is a stable one"


def save(folder: Path, label: str, name: str, pixels: np.ndarray, **options: object) -> None:
    (folder / label).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / label / name, **options)


@pytest.fixture
def globes(tmp_path: Path) -> Path:
    "Forty globes of two classes."
    for body, i, _, pixels in render_many(20, 64, bodies=("Mars", "Jupiter")):
        save(tmp_path / "photos", body, f"{i:02}.png", pixels)
    return tmp_path


def degraded(path: Path, way: int) -> np.ndarray:
    "A picture compressed again, made smaller, or darker."
    image = Image.open(path).convert("RGB")
    if way == 0:
        image.save(file := io.BytesIO(), "JPEG", quality=70)
        return np.asarray(Image.open(file))
    return np.asarray(image.resize((48, 48)) if way == 1 else image.point(lambda value: int(value * 0.93)))


def test_near_duplicates_that_are_added_follow_their_picture(globes: Path) -> None:
    "With the catalog of the first run as the table of splits: no image moves, and no copy is on another side."
    data = Data(source="folder", folder=str(globes / "photos"), split="stable", groups=["near"])
    first = make_data_set(data, 7, globes, globes)
    assert set(first.split) == {"train", "val", "test"} and "group_key" in first
    first.to_parquet(globes / "splits.parquet")
    for i, path in enumerate(sorted((globes / "photos").rglob("*.png"))):
        save(path.parent.parent, path.parent.name, f"{path.stem}-copy.png", degraded(path, i % 3))
    data = data.model_copy(update={"split_file": "splits.parquet"})
    second = make_data_set(data, 7, globes, globes).set_index("path")
    assert (second.split[first.path] == first.split.to_numpy()).all() and len(second) == 80
    copies = second[second.index.str.contains("-copy")]
    same = copies.split.to_numpy() == second.split[copies.index.str.replace("-copy", "")].to_numpy()
    assert same.mean() > 0.95, "what is near enough to be taken for one picture"
    assert (second.groupby("group_key").split.nunique() == 1).all()


def test_a_stable_run_begins_with_its_own_catalog(globes: Path) -> None:
    "Copies that are larger than their pictures, and so would lead the group, follow all the same."
    data, run = Data(source="folder", folder=str(globes / "photos"), split="stable", groups=["near"]), globes / "run"
    first = make_data_set(data, 7, globes, run)
    run.mkdir()
    first.to_parquet(run / "catalog.parquet")  # as the step writes them
    write_json(run / "acquire.json", {"seed": 7} | data.model_dump())
    for path in sorted((globes / "photos").rglob("*.png")):
        larger = Image.open(path).resize((96, 96), Image.Resampling.BICUBIC)
        save(path.parent.parent, path.parent.name, f"a{path.stem}.png", np.asarray(larger))
    second = make_data_set(data, 7, globes, run).set_index("path")
    assert (second.split[first.path] == first.split.to_numpy()).all()
    grouped = second.groupby("group_key").filter(lambda rows: len(rows) > 1)
    assert len(grouped) > 60 and (grouped.groupby("group_key").split.nunique() == 1).all()
    other = make_data_set(data.model_copy(update={"test": 0.4}), 7, globes, run).set_index("path")
    assert (other.split == "test").mean() > 0.25, "other parameters, another split"


def test_groups_of_a_column_are_never_torn_apart(globes: Path) -> None:
    table = pd.DataFrame(
        {"file_name": [p.relative_to(globes / "photos").as_posix() for p in (globes / "photos").rglob("*.png")]}
    )
    table["label"] = table.file_name.str.partition("/")[0]
    table["night"] = [f"night {i % 9}" for i in range(len(table))]
    table.to_csv(globes / "labels.csv", index=False)
    data = Data(source="folder", folder=str(globes / "photos"), labels=str(globes / "labels.csv"), groups=["night"])
    for split in ("auto", "stratified", "stable"):
        catalog = make_data_set(data.model_copy(update={"split": split}), 7, globes, globes)
        assert (catalog.groupby("night").split.nunique() == 1).all(), split
    with pytest.raises(CelestialError) as failure:
        make_data_set(data.model_copy(update={"groups": ["nihgt"]}), 7, globes, globes)
    assert "night" in failure.value.message


def test_a_table_of_splits(globes: Path) -> None:
    "Its pictures are where it has them; the others are split by their hashes."
    (globes / "splits.csv").write_text("file_name,split\nMars/00.png,test\nMars/01.png,val\nMars/gone.png,train\n")
    data = Data(source="folder", folder=str(globes / "photos"), split_file="splits.csv")
    catalog = make_data_set(data, 7, globes, globes).set_index("path")
    assert list(catalog.split[["photos/Mars/00.png", "photos/Mars/01.png"]]) == ["test", "val"]
    assert catalog.attrs["split_by"] == "splits.csv, stable"
    free = with_split(catalog.reset_index().drop(columns="split"), Data(split="stable"), 7).set_index("path")
    others = free.index.drop(["photos/Mars/00.png", "photos/Mars/01.png"])
    assert (free.split[others] == catalog.split[others]).all()
    for wrong in (
        "file_name,split\nVenus/00.png,test\n",
        "file_name,label\nMars/00.png,Mars\n",
        "file_name,split\nMars/00.png,exam\n",
    ):
        (globes / "splits.csv").write_text(wrong)
        with pytest.raises(CelestialError):
            make_data_set(data, 7, globes, globes)
    with pytest.raises(CelestialError):
        make_data_set(data.model_copy(update={"split_file": "nowhere.csv"}), 7, globes, globes)
