"The pipeline end to end at smoke size: run, rerun, changed, broken."

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from projects import Celestial

from celestial_ml.core.files import read_json
from celestial_ml.data.images import decode_image
from celestial_ml.data.sources import SOURCES, Source
from celestial_ml.demo.side_by_side import published_versions
from celestial_ml.flow.pipeline import Plan, execute, make_plan
from celestial_ml.flow.steps import Task, load_tasks
from celestial_ml.monitor.log import open_log
from celestial_ml.monitor.reference import logged_figures
from celestial_ml.monitor.snapshot import read_snapshot
from celestial_ml.package.graph import Graph

ROOT = Path(__file__).parent.parent
ALL = list(load_tasks(ROOT, "default"))


def rerun(root: Path, *settings: str, params: str = "smoke", **options: str) -> list[str]:
    "Run again; the steps that ran, as their products tell."
    tasks = load_tasks(root, options.get("run", params))
    before = {name: made(task) for name, task in tasks.items()}
    plan = make_plan(root, params, list(settings), **options)
    execute(plan, quiet=True)
    ran = [name for name, task in tasks.items() if made(task) != before[name]]
    assert ran == list(plan.stale), "the plan said what would run"
    assert make_plan(root, params, list(settings), **{k: v for k, v in options.items() if k == "run"}).stale == {}
    return ran


def made(task: Task) -> int:
    "When a step's notebook was written."
    path = task.product["notebook"]
    return path.stat().st_mtime_ns if path.exists() else 0


def test_every_product_is_there(smoke: Plan) -> None:
    for task in smoke.tasks.values():
        for path in task.product.values():
            assert path.stat().st_size > 0, path
    assert not list(Path("output/smoke").rglob("*.part*")), "nothing half-written is left"
    html = Path("output/smoke/evaluate.html").read_text()
    assert "Mistakes first" in html and "data:image/png;base64" in html


def test_metrics_agree_with_predictions(smoke: Plan) -> None:
    metrics, table = read_json("output/smoke/metrics.json"), pd.read_parquet("output/smoke/predictions.parquet")
    assert metrics["accuracy"] == pytest.approx((table.label == table.predicted).mean())
    assert metrics["images"] == len(table) == 20 and set(metrics["per_class"]) == set(table.label)
    assert np.allclose(np.stack(table.probabilities.tolist()).sum(1), 1)
    features = pd.read_parquet("output/smoke/features.parquet")
    assert set(table.path) == set(features.path[features.split == "test"]), "measured on held-out images only"


def test_model_knows_where_it_comes_from(smoke: Plan) -> None:
    about = read_json("output/smoke/model.json")
    assert about["background"] == "auto" and about["statistics"]["brightness"]["images"] > 0
    assert about["parity"] < 1e-3 and about["metrics"] == read_json("output/smoke/metrics.json")
    lineage = about["lineage"]
    assert lineage["run"] == "smoke" and lineage["parameters"]["train"]["epochs"] == 2
    assert len(lineage["data_sha256"]) == 64 and lineage["mlflow_run"]


def test_mlflow_has_the_whole_run(smoke: Plan) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{os.environ['CELESTIAL_HOME']}/mlflow.db")
    about = read_json("output/smoke/model.json")
    run = client.get_run(about["lineage"]["mlflow_run"])
    assert run.info.status == "FINISHED" and run.data.params["epochs"] == "2"
    assert run.data.tags["data_sha256"] == about["lineage"]["data_sha256"] and run.data.tags["code_revision"]
    assert run.data.metrics["test_accuracy"] == pytest.approx(about["metrics"]["accuracy"])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val_loss")] == [1, 2]
    assert run.data.tags["kind"] == "training" and run.data.tags["gate"] == "unregistered"
    assert read_json("output/smoke/report.json")["in_short"][0] in run.data.tags["mlflow.note.content"]
    [images] = run.inputs.dataset_inputs
    assert (images.dataset.name, images.dataset.digest) == ("render", about["lineage"]["data_sha256"][:36])
    kept = {f.path for folder in ("notebooks", "plots", "data") for f in client.list_artifacts(run.info.run_id, folder)}
    assert {
        "notebooks/train.ipynb",
        "notebooks/package.html",
        "plots/confusion_matrix.png",
        "data/metrics.json",
    } <= kept


def test_a_smoke_run_is_judged_and_stays_out_of_the_registry(smoke: Plan) -> None:
    verdict = read_json("output/smoke/register.json")
    assert not verdict["promoted"] and verdict["decision"] == "unregistered" and "is below" in verdict["reasons"][0]
    missed = [rule["name"] for rule in verdict["rules"] if not rule["passed"]]
    words = f"it misses {len(missed)} of {len(verdict['rules'])} rules: {', '.join(missed)}"
    assert verdict["reasons"][-1].endswith(words), "what the gate would say"
    assert {rule["kind"]: rule["passed"] for rule in verdict["rules"]}["deployment"], "it could be served"
    assert not Path(os.environ["CELESTIAL_HOME"], "models").exists()


def test_a_version_has_a_card_with_its_figures(smoke: Plan) -> None:
    metrics, model = read_json("output/smoke/metrics.json"), read_json("output/smoke/register.json")["model"]
    text, page = (Path(f"output/smoke/model_card.{kind}").read_text() for kind in ("md", "html"))
    span = metrics["intervals"]["accuracy"]
    assert f"| accuracy | {span['value']:.3f} | {span['low']:.3f} to {span['high']:.3f} |" in text
    for picture in re.findall(r"\]\((.+?\.png)\)", text):
        assert Path("output/smoke", picture).is_file(), picture
    assert (
        text.count("![") == page.count("data:image/webp;base64") == 5
        and "http://" not in page
        and "https://" not in page
    )
    for name in (*metrics["per_class"], "out of scope", "lineage", "verdict of the gate", model):
        assert name.lower() in text.lower() and name.lower() in page.lower(), name


def test_a_run_has_a_bill_of_materials_with_the_energy_of_its_training(smoke: Plan) -> None:
    folder = Path("output/smoke")
    energy, bill = read_json(folder / "train.json")["energy"], read_json(folder / "bom.json")
    assert 0 < energy["kwh"] < 1 and 0 < energy["kg_co2e"] < 1 and energy["how"] in ("measured", "estimated")
    model = bill["metadata"]["component"]
    assert bill["specVersion"] == "1.6" and model["hashes"][0]["content"] == read_json(folder / "model.json")["sha256"]
    used = model["modelCard"]["considerations"]["environmentalConsiderations"]["energyConsumptions"][0]
    assert used["activityEnergyCost"] == {"value": energy["kwh"], "unit": "kWh"}
    assert "energy of the training" in (folder / "model_card.md").read_text()
    assert "codecarbon" not in (folder / "train.html").read_text(), "it's quiet"
    schema = JsonStrictValidator(SchemaVersion.V1_6)
    assert schema.validate_str(json.dumps(bill)) is None
    model["modelCard"]["modelParameters"]["tsak"] = "a misspelt key"
    assert schema.validate_str(json.dumps(bill)) is not None


@pytest.mark.slow
def test_the_step_monitor_looks_at_the_answers_of_the_run(unspoilt: Path, celestial_here: Celestial) -> None:
    "It raises an alarm at black pictures, and writes its page."
    model, log = Graph("output/smoke"), open_log()
    pictures = [decode_image(Path(path)) for path in pd.read_parquet("output/smoke/catalog.parquet").path]
    shown = [*pictures, *pictures, *[np.zeros_like(pictures[0])] * 60]
    for i, row in enumerate(logged_figures(model, shown).to_dict("records")):
        about = {"request_id": f"r{i}", "time": time.time(), "role": "champion", "model_version": model.version}
        log.record(row | about | {"sha256": "0" * 64, "latency_ms": 2.0})
    log.close()
    done = celestial_here("run", "smoke", "--with", "monitor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ran"] == ["monitor"]
    report = read_json("output/smoke/drift_report.json")
    assert report["severity"] != "none" and report["model"] == model.version
    assert Path("output/smoke/drift_report.html").is_file() and read_snapshot().alarms


def test_a_run_has_a_card_of_its_images_and_croissant_loads_them(smoke: Plan) -> None:
    import mlcroissant

    catalog, folder = pd.read_parquet("output/smoke/catalog.parquet"), Path("output/smoke")
    text, page = ((folder / f"data_card.{kind}").read_text() for kind in ("md", "html"))
    assert f"| images | {len(catalog)} | {catalog.sha256.nunique()} of them distinct |" in text
    for label, rows in catalog.groupby("label"):
        in_split = [(rows.split == split).sum() for split in ("train", "val", "test")]
        assert f"| {label} | {' | '.join(map(str, (*in_split, len(rows))))} |" in text
    licence = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert f"| render | {licence} |" in text and read_json(folder / "acquire.json")["data_sha256"] in text
    assert (folder / "plots/contact_sheet.png").is_file() and "](plots/contact_sheet.png)" in text
    assert page.count("data:image/webp;base64") == 1
    for report in ("report", "model_card"):
        assert 'href="data_card.html"' in (folder / f"{report}.html").read_text()
    loaded = mlcroissant.Dataset(folder / "croissant.json")
    assert loaded.metadata.ctx.issues.errors == set() and loaded.metadata.license[0].endswith(f"/{licence}.html")
    records = pd.DataFrame(dict(record) for record in loaded.records("images"))
    for name in ("path", "label", "split", "sha256"):
        assert records[f"images/{name}"].str.decode("utf-8").tolist() == catalog[name].tolist()
    assert records["images/width"].tolist() == catalog.width.tolist() and len(records.columns) == len(catalog.columns)


def test_nothing_changed_nothing_runs_and_nothing_slow_is_imported(smoke: Plan, at_home: Path) -> None:
    assert make_plan(at_home, "smoke").stale == {}
    code = (
        "import sys; from celestial_ml.cli.app import app\n"
        "try: app(['run', 'smoke', '--json'])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "slow = {'ploomber', 'tensorflow', 'mlflow', 'pandas', 'papermill', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=at_home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ran"] == []


@pytest.fixture
def unspoilt(smoke: Plan, smoke_run: Path, at_home: Path) -> Iterator[Path]:
    "The project as its run left it, before a test and after."
    yield at_home
    for name in ("output", "nbs", "celestial_ml"):
        shutil.copytree(smoke_run / name, at_home / name, dirs_exist_ok=True)
    assert not make_plan(at_home, "smoke").stale


def test_a_run_is_registered_where_somebody_asks_and_a_refused_one_is_set_aside(unspoilt: Path) -> None:
    from mlflow import MlflowClient

    assert rerun(unspoilt, "register.publish=true") == ["register"], "nothing else depends on it"
    verdict = read_json("output/smoke/register.json")
    assert (verdict["model"], verdict["decision"], verdict["promoted"]) == ("celestial/1", "refuse", False)
    home = Path(os.environ["CELESTIAL_HOME"])
    assert (home / "models/celestial/1/model_card.html").read_text() == Path("output/smoke/model_card.html").read_text()
    assert not (home / "models/champion.json").exists() and published_versions() == {}, "nobody compares it"
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    assert client.get_registered_model("celestial").aliases == {}
    assert client.get_model_version("celestial", "1").description.startswith(
        read_json("output/smoke/report.json")["in_short"][0]
    )


def test_a_changed_parameter_reruns_what_depends_on_it(unspoilt: Path) -> None:
    assert rerun(unspoilt, "explain.stride=8") == ["explain", "register"]
    assert list(make_plan(unspoilt, "smoke").stale) == ["explain", "register"], "and so does the way back"


def test_a_changed_notebook_reruns_what_depends_on_it(unspoilt: Path) -> None:
    path = unspoilt / "nbs/steps/06_explain.ipynb"
    before = path.read_text()
    path.write_text(before.replace("# Which images", "# Which pictures"))
    assert rerun(unspoilt) == ["explain", "register"]
    path.write_text(before)
    assert list(make_plan(unspoilt, "smoke").stale) == ["explain", "register"]


def test_a_plan_only_reads(unspoilt: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in unspoilt.rglob("*") if "__pycache__" not in path.parts}

    before = state()
    assert set(make_plan(unspoilt, "smoke", force=True).stale.values()) == {"you asked for it"}
    assert make_plan(unspoilt, "smoke", run="new", start="train").stale["train"] == "you asked for it"
    guide = make_plan(unspoilt, "smoke", ["data.source=guide"], run="guide")
    assert guide.stale["acquire"] == "its images are to be fetched" and guide.inputs["acquire"]["images"] == ""
    both = make_plan(unspoilt, "smoke", ["data.sources=[render,guide]"], run="both")
    assert both.stale["acquire"] == "its images are to be fetched" and both.inputs["acquire"]["images"] == ""
    photos = make_plan(unspoilt, "smoke", ["evaluate.photos=output/smoke/images"])
    assert next(iter(photos.stale)) == "evaluate" and "the images changed" in photos.stale["evaluate"]
    assert state() == before and not make_plan(unspoilt, "smoke").stale


def test_images_are_fetched_when_the_plan_is_executed(
    smoke: Plan, at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(data: object, seed: int, root: Path, run: Path) -> Path:
        if not (root / "fetched").exists():
            shutil.copytree("output/smoke/images", root / "fetched", ignore=shutil.ignore_patterns("metadata.csv"))
        return root / "fetched"

    monkeypatch.setitem(SOURCES, "elsewhere", Source(fetch, lambda data, root: root / "fetched"))
    plan = make_plan(at_home, "smoke", ["data.source=elsewhere"], run="fetched", until="acquire")
    assert plan.stale == {"acquire": "its images are to be fetched"} and not (at_home / "fetched").exists()
    execute(plan, quiet=True)
    assert (at_home / "fetched").is_dir()
    assert make_plan(at_home, "smoke", ["data.source=elsewhere"], run="fetched", until="acquire").stale == {}


def test_several_sources_make_one_data_set(smoke: Plan, at_home: Path) -> None:
    shutil.copytree("output/smoke/images/Mars", "more/Mars")
    shutil.copytree("output/smoke/images/Moon", "more/Moon")
    (Path("more") / "Mars" / "Mars_0000.jpg").unlink()
    chosen = ["data.sources=[render,folder]", "data.folder=more", "data.per_class=6", "seed=8"]
    plan = make_plan(at_home, "smoke", chosen, run="several", until="acquire")
    execute(plan, quiet=True)
    catalog, settings = pd.read_parquet("output/several/catalog.parquet"), read_json("output/several/acquire.json")
    assert catalog.source.value_counts().to_dict() == {"render": 60, "folder": 23}
    assert (catalog.groupby("source").split.nunique() == 3).all() and settings["sources"] == ["render", "folder"]
    assert (
        plan.inputs["acquire"]["images"] and not make_plan(at_home, "smoke", chosen, "several", until="acquire").stale
    )
    (Path("more") / "Moon" / "Moon_0000.jpg").unlink()
    changed = make_plan(at_home, "smoke", chosen, "several", until="acquire").stale
    assert changed == {"acquire": "the images changed"}


def test_values_in_the_parameters_cell_do_not_make_a_step_stale(unspoilt: Path) -> None:
    path = unspoilt / "nbs/steps/06_explain.ipynb"
    before = path.read_text()
    path.write_text(re.sub(r"stride = \d+", "stride = 5", before))
    assert path.read_text() != before and not make_plan(unspoilt, "smoke").stale, "a run tells them"


def test_a_step_run_on_its_own_is_run_again(unspoilt: Path) -> None:
    told = {"run": "smoke", "min_per_class": 3}
    papermill.execute_notebook("nbs/steps/02_check.ipynb", str(unspoilt / "x.ipynb"), told, progress_bar=False)
    stale = make_plan(unspoilt, "smoke").stale
    assert list(stale) == ALL[1:] and stale["check"] == "its files were written outside of the pipeline"


def test_a_changed_module_reruns_what_imports_it_even_through_another(unspoilt: Path, smoke: Plan) -> None:
    at_home = unspoilt
    module = at_home / "celestial_ml/model/export.py"  # of the steps, only `package` imports it
    before = module.read_text()
    assert "celestial_ml/model/export.py" in smoke.inputs["package"]["modules"]
    module.write_text(before + "\n# changed\n")
    assert rerun(at_home) == ["package", "register"]
    module.write_text(before)
    indirect = at_home / "celestial_ml/data/features.py"  # `check` and `prepare` import what imports it
    before = indirect.read_text()
    indirect.write_text(before + "\n# changed\n")
    plan = make_plan(at_home, "smoke")
    assert plan.stale["check"] == "celestial_ml/data/features.py changed" and "acquire" not in plan.stale
    assert "celestial_ml/data/features.py" in plan.inputs["package"]["modules"]
    indirect.write_text(before)
    assert list(make_plan(at_home, "smoke").stale) == ["package", "register"]


def test_a_changed_image_reruns_everything_that_saw_it(smoke: Plan, at_home: Path) -> None:
    photos = at_home / "photos"
    shutil.copytree("output/smoke/images", photos, ignore=shutil.ignore_patterns("metadata.csv"))
    settings = ["data.source=folder", "data.folder=photos"]
    execute(make_plan(at_home, "smoke", settings, run="photos", until="acquire"), quiet=True)
    assert "acquire" not in make_plan(at_home, "smoke", settings, run="photos").stale
    first, second = sorted((photos / "Mars").iterdir())[:2]
    shutil.copy2(second, first)
    os.utime(first, ns=(0, 0))  # its time says nothing
    plan = make_plan(at_home, "smoke", settings, run="photos")
    assert plan.stale["acquire"] == "the images changed" and list(plan.stale) == ALL
    (photos / "Mars" / "note.txt").write_text("not an image, but in the folder")
    assert make_plan(at_home, "smoke", settings, run="photos").stale


def test_from_and_force(unspoilt: Path) -> None:
    assert rerun(unspoilt, start="register") == ["register"]
    assert list(make_plan(unspoilt, "smoke", force=True).stale) == ALL


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smoke", "--set", "train.lrr=1"], "did you mean train.lr?"),
        (["smoke", "--set", "train.epochs=0"], "from 1, up to 1000"),
        (["smok"], "did you mean 'smoke'?"),
        (["smoke", "--set", "model.network=compct"], "did you mean 'compact'?"),
        (["smoke", "--set", "data.source=gide"], "did you mean 'guide'?"),
        (["smoke", "--set", "data.source=folder"], "data.folder is not set"),
        (["smoke", "--set", "evaluate.photos=nowhere"], "nowhere is not a folder"),
        (["smoke", "--set", "data.source=folder", "--set", "data.folder=nowhere"], "nowhere is not a folder"),
        (["smoke", "--from", "trian"], "did you mean 'train'?"),
        (["smoke", "--run", "../up"], "can't be the name of a run"),
        (["smoke", "--executor", "magic"], "is not one of 'inline', 'kernel'"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(celestial, arguments: list[str], words: str) -> None:
    result = celestial("run", *arguments)
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_a_typo_in_a_params_file_names_the_file(celestial, project: Path) -> None:
    (project / "params/typo.yaml").write_text("train: {epoch: 3}\n")
    result = celestial("run", "typo")
    assert result.returncode == 2
    assert re.search(r"typo\.yaml: train\.epoch is not a parameter; did you mean train\.epochs\?", result.stderr)
    (project / "params/typo.yaml").unlink()


def test_a_class_with_one_image_fails_the_check_and_names_the_notebook(
    celestial_here, project: Path, smoke: Plan
) -> None:
    few = project / "few"
    shutil.copytree("output/smoke/images", few, ignore=shutil.ignore_patterns("metadata.csv"))
    for path in sorted((few / "Moon").iterdir())[1:]:
        path.unlink()
    result = celestial_here("run", "smoke", "--run", "few", "--set", "data.source=folder", "--set", "data.folder=few")
    assert result.returncode == 1, result.stderr
    assert re.search(r"check failed in cell \d+: .*Moon has 1; 5 distinct images a class are needed", result.stderr)
    assert "output/few/check.ipynb" in result.stderr and "Traceback" not in result.stderr + result.stdout
    assert Path("output/few/checks.json").exists() and not Path("output/few/pixels.npy").exists()


@pytest.mark.parametrize("executor", ["inline", pytest.param("kernel", marks=pytest.mark.slow)])
def test_a_failed_step_names_step_cell_error_and_notebook(celestial_here, unspoilt: Path, executor: str) -> None:
    path = unspoilt / "nbs/steps/06_explain.ipynb"
    path.write_text(path.read_text().replace('\\"confidence\\", \\"path\\"]]', '\\"confidnce\\", \\"path\\"]]'))
    result = celestial_here("run", "smoke", "--executor", executor)
    assert result.returncode == 1
    assert re.search(r"explain failed in cell \d+: KeyError: .*confidnce", result.stderr), result.stderr
    assert "output/smoke/explain.ipynb" in result.stderr and "Traceback" not in result.stderr


def test_a_step_without_its_upstream_is_an_error(at_home: Path) -> None:
    with pytest.raises(papermill.PapermillExecutionError, match="Run acquire first"):
        papermill.execute_notebook(
            "nbs/steps/02_check.ipynb", str(at_home / "x.ipynb"), {"run": "nothing-yet"}, progress_bar=False
        )
