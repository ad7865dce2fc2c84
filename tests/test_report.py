"""Reports: a run on one page, and a run beside a revision.

`CELESTIAL_SCREENSHOTS=1` writes the picture of the documentation to nbs/images, of the run `default`.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from packages import package
from PIL import Image
from programs import chromium, git
from typer.testing import CliRunner

from celestial_ml.cli.app import app
from celestial_ml.core.files import read_json, write_json
from celestial_ml.core.intervals import share_interval
from celestial_ml.core.page_builder import share
from celestial_ml.core.params import Register
from celestial_ml.data.versions import KINDS, record
from celestial_ml.flow.pipeline import Plan, execute, make_plan
from celestial_ml.package.manifest import Manifest
from celestial_ml.package.metrics import Metrics
from celestial_ml.package.published import published
from celestial_ml.registry.decisions import submit
from celestial_ml.registry.evidence import EVIDENCE, Evidence
from celestial_ml.registry.gate import Rule, _conclude
from celestial_ml.registry.metric_comparison import make_comparison
from celestial_ml.registry.versions import publish, read_version
from celestial_ml.reports.answers import in_short
from celestial_ml.reports.comparison import compare_run, report_page
from celestial_ml.reports.model_card import make_card, verdict_words
from celestial_ml.reports.run_report import against_version, make_report, rival

ROOT = Path(__file__).resolve().parent.parent
SCREENSHOTS = ROOT / "nbs" / "images" if os.environ.get("CELESTIAL_SCREENSHOTS") else None
LAX = ["accuracy", "macro_f1", "class_f1", "slice"]
LET_PASS = ["register.publish=true"] + [f"register.min_{name}=0" for name in LAX] + [
    "register.max_slice_gap=1", "register.max_ece=1", "register.max_false_alarms=1", "register.must_beat=[]",
]  # fmt: skip


def tables(markdown: str) -> list[list[list[str]]]:
    "The tables that a Markdown text really has, as rows of cells."
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            found[-1][-1].append("")
        elif token.type == "inline" and found and found[-1] and found[-1][-1] and found[-1][-1][-1] == "":
            found[-1][-1][-1] = token.content or " "
    return found


def table_with(markdown: str, header: str) -> dict[str, list[str]]:
    "The table with that in its header, by its first column."
    [rows] = [rows for rows in tables(markdown) if header in rows[0]]
    assert {len(row) for row in rows} == {len(rows[0])}, "every row has all cells"
    return {row[0]: row[1:] for row in rows[1:]}


# ---------------------------------------------------------------------------------------------- a run on one page


def page_of(run: str) -> tuple[str, str, dict[str, Any]]:
    "The report of a run in its forms."
    folder = Path("output", run)
    page, text = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert len(page) < 2_000_000 and not re.search(r'(src|href)="(?!#|data:|[a-z_]+\.html")', page), (
        "it needs nothing else"
    )
    assert "://" not in page and not re.search(r"@import|<script|style=", page)
    for address in re.findall(r'href="([a-z_]+\.html)"', page):
        assert (folder / address).is_file() and f"]({address})" in text, address
    for picture in re.findall(r"\]\((plots/.+?)\)", text):
        assert (folder / picture).is_file(), picture
    return page, text, read_json(folder / "report.json")


def test_a_run_without_a_champion_has_its_page(smoke: Plan) -> None:
    page, text, told = page_of("smoke")
    metrics, verdict = read_json("output/smoke/metrics.json"), read_json("output/smoke/register.json")
    assert told["since"] is None and "There is no champion to compare it with" in text
    assert "not registered" in page and verdict["reasons"][-1] in text
    assert [line[:10] for line in told["in_short"]] == ["Is it good", "Is it bett", "What does ", "May it be "]
    assert f" of {metrics['images']} (" in told["in_short"][0]
    by_class = table_with(text, "recall")
    assert set(by_class) == set(metrics["per_class"])
    assert sum(int(row[0]) for row in by_class.values()) == round(metrics["accuracy"] * metrics["images"])
    counts = table_with(text, "train")
    assert sum(int(row[-1]) for row in counts.values()) == 120
    for part in ("What it is for", "The data", "The result", "Examples", "Limits", "Where it comes from"):
        assert f"## {part}" in text and f"<h2>{part}</h2>" in page, part
    wrong = metrics["images"] - round(metrics["accuracy"] * metrics["images"])
    assert f"**Wrong.** {wrong or 'None'} of {metrics['images']} images" in text
    assert page.count("data:image/webp") > 30, "the pictures are in it"
    about = read_json("output/smoke/model.json")
    assert all(about["lineage"][key] in text for key in ("data_sha256", "code_revision", "mlflow_run"))
    assert [name for name in smoke.tasks if f"[{name}]({name}.html)" not in text] == []


def test_a_champion_has_its_page(smoke: Plan, at_home: Path) -> None:
    plan = make_plan(at_home, "smoke", LET_PASS)
    assert list(plan.stale) == ["register"]
    execute(plan, quiet=True)
    page, text, told = page_of("smoke")
    assert read_json("output/smoke/register.json")["decision"] == "promote"
    assert told["since"] is None and "There is no champion to compare it with" in text
    assert "It became champion" in told["in_short"][-1] and '<body class="promote">' in page
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{os.environ['CELESTIAL_HOME']}/mlflow.db")
    run = read_json("output/smoke/model.json")["lineage"]["mlflow_run"]
    kept = {file.path for file in client.list_artifacts(run, "data")}
    assert {"data/report.html", "data/report.md", "data/report.json"} <= kept


def test_a_run_prints_the_path_of_its_page(smoke: Plan, at_home: Path) -> None:
    done = CliRunner().invoke(app, ["run", "smoke", *(arg for s in LET_PASS for arg in ("--set", s))])
    assert done.exit_code == 0 and "look:  output/smoke/report.html" in done.output, done.output


# ------------------------------------------------------------------------------- no sentence against its table


@st.composite
def measured(draw: st.DrawFn) -> Metrics:
    "Metrics that a run might have; perfect, hopeless and nearly perfect ones among them."
    names = ["Mars", "Moon", "a | b", "<Pluto>"][: draw(st.integers(2, 4))]
    images = {name: draw(st.sampled_from([1, 7, 30, 100, 2999])) for name in names}
    right = {name: draw(st.sampled_from([0, n // 2, n - 1, n, n])) for name, n in images.items()}
    total, hits = sum(images.values()), sum(right.values())
    low, high = share_interval(hits, total)
    alarms = draw(st.sampled_from([0, 1, total // 50, total]))
    kinds = {
        kind: (draw(st.sampled_from([0, 1, 59, 60])), 60)
        for kind in draw(st.sets(st.sampled_from(["noise", "random_worlds"])))
    }
    content = {
        "split": "test", "images": total, "accuracy": hits / total, "macro": {"f1": hits / total},
        "intervals": {key: {"value": hits / total, "low": low, "high": high} for key in ("accuracy", "macro_f1", "ece", "loss", "brier")},
        "per_class": {n: dict.fromkeys(("precision", "recall", "f1"), right[n] / images[n]) | {"images": images[n]} for n in names},
        "confused": [{"label": n, "predicted": names[i - 1], "images": images[n] - right[n]} for i, n in enumerate(names) if right[n] < images[n]],
        "unknown": {"false_alarm_rate": alarms / total, "kinds": {kind: {"unknown": caught / n, "images": n} for kind, (caught, n) in kinds.items()}},
    }  # fmt: skip
    return Metrics.of(content, "")


def sentence(text: str, pattern: str) -> list[int]:
    "The numbers of the one sentence that is like this."
    [numbers] = re.findall(pattern, text)
    return [int(number) for number in numbers]


RULES = [Rule("accuracy", "floor", 0.9, 0.8, True, "it is"), Rule("beats guide-baseline", "baseline", None, None, True, "not measured"),
         Rule("ECE", "floor", 0.3, 0.1, False, "it is above"), Rule("size", "floor", 9, 20, True, "it is")]  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    measured(),
    measured(),
    st.sets(st.sampled_from(range(4)), min_size=1),
    st.sampled_from([None, "celestial/1", "celestial/2"]),
)
def test_no_sentence_contradicts_its_table(
    ours: Metrics, theirs: Metrics, chosen: set[int], champion: str | None
) -> None:
    rules = [RULES[i] for i in sorted(chosen)]
    decision, conclusion = _conclude([r for r in rules if not r.passed], rules, champion, None, Register(), True)
    verdict = {"model": "celestial/2", "decision": "keep" if champion == "celestial/2" else decision, "champion": champion,
               "reasons": [conclusion], "rules": [vars(rule) for rule in rules]}  # fmt: skip
    about = Manifest.of(
        {"classes": list(ours.per_class), "ood_threshold": 1.0, "sha256": "0" * 64, "version": "2", "metrics": ours.to_json(),
         "lineage": {"run": "r", "created": "2026-01-01"}}, "")  # fmt: skip
    since = make_comparison(("this run", "celestial/1"), (ours, theirs), ({}, {}))
    catalog = pd.DataFrame({"path": "a.png", "label": list(ours.per_class), "split": "test"})
    empty = pd.DataFrame(
        {"path": [], "label": [], "predicted": [], "correct": np.zeros(0, bool), "confidence": [], "ood_score": []}
    )
    text = make_report(about, verdict, since, catalog, [], empty, Path(), {}, []).markdown()
    card = make_card(about, verdict, catalog, [], [], {}).markdown()
    for count, images, percent in re.findall(r"(\d+) of (\d+) \(([^)]+)\)", text + card):
        assert percent == share(int(count) / int(images)) and (percent == "100.0 %") == (count == images), (
            count,
            images,
        )
        assert (percent == "0.0 %") == (count == "0"), (count, images)
    by_class = table_with(text, "recall")
    correct, images = (sum(int(row[i]) for row in by_class.values()) for i in (0, 1))
    assert sentence(text, r"(\d+) of (\d+) \([^)]+\) test images are classified correctly") == [correct, images]
    wrong = images - correct
    assert f"What does it get wrong? {wrong or 'None'} of {images} images." in text
    assert f"**Wrong.** {wrong or 'None'} of {images} images" in text
    assert ("Most often" in text) == ("The worst class is" in text) == bool(wrong)
    if wrong:
        worst = re.findall(r"The worst class is (.+?): (\d+) of (\d+) \(([^)]+)\) right", text)
        assert worst == [(name, *row[:3]) for name, row in by_class.items()][:1]
        assert row_shares(by_class)[0] == min(row_shares(by_class))
    [alarms, _] = sentence(text, r"(\d+) of (\d+) \([^)]+\) images of the classes are called unknown")
    assert f"**Called unknown.** {alarms or 'None'} of {images} images" in text
    assert (
        f"{share(ours.unknown.false_alarm_rate)} of the test images are called unknown" in card
        or not ours.unknown.kinds
    )
    if ours.unknown.kinds:
        passed, tried = sentence(text, r"(\d+) of (\d+) \([^)]+\) images that show none of the classes")
        kinds = table_with(card, "AUROC")
        assert sum(int(row[0]) for row in table_with(text, "taken for a class").values()) == passed
        assert tried == sum(int(row[-1]) for row in kinds.values()) and (passed == 0) == (
            {row[0] for row in kinds.values()} == {"100.0 %"}
        )
        assert share((tried - passed) / tried) == next(
            row[1] for row in tables(card)[0] if row[0] == "unknowns recognised"
        )
    figures = table_with(text, "tested by")["accuracy"]
    assert (
        f": {figures[1]} against {figures[0]}, {figures[2]} points" in text
        and text.count(f"{figures[1]} against {figures[0]}") == 2
    )
    short = {
        "better": "Yes.",
        "worse": "No, it is worse.",
        "the same": "It is the same.",
        "no clear difference": "No clear difference.",
    }
    assert f"**Is it better than before? {short[figures[-1]]}**" in text
    marks = [row[1] for row in table_with(text, "finding").values()]
    assert marks == [row[1] for row in table_with(card, "finding").values()] and marks.count("–") == (1 in chosen)
    assert ("misses" in verdict_words(verdict)) == ("✗" in marks)
    if "✗" not in marks:
        assert f"passes all {marks.count('✓')} rules" in text
    assert ("**May it be shipped? Yes.**" in text) == (verdict["decision"] in ("promote", "keep"))


def row_shares(rows: dict[str, list[str]]) -> list[float]:
    "Right over all, of a table of classes."
    return [int(row[0]) / int(row[1]) for row in rows.values()]


# -------------------------------------------------------------------------------------------- beside the champion


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A registry of one's own."
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def registered(folder: Path, number: int, right: np.ndarray | float) -> str:
    "A version that gets so many right."
    publish(package(folder / str(number), right), f"celestial/{number}")
    return f"celestial/{number}"


def predictions_of(answers: Evidence) -> pd.DataFrame:
    columns = {"path": answers.path, "label": answers.label, "predicted": answers.predicted, "correct": answers.correct}
    return pd.DataFrame(columns | {"confidence": 0.9, "ood_score": answers.ood_score})


def written(folder: Path, model: str, verdict: dict[str, Any]) -> tuple[str, str]:
    "The report of a version, as the step register makes it."
    about, answers = read_version(model), Evidence.load(published(model))
    assert answers is not None
    catalog = pd.DataFrame({"path": "a.png", "label": ["Mars", "Neptune"], "split": ["train", "test"]})
    since = against_version(about, answers, verdict)
    report = make_report(about, verdict, since, catalog, [], predictions_of(answers), folder, {}, [])
    return report.markdown(), report.html()


def test_a_worse_run_is_reported_with_its_test(home: Path, tmp_path: Path) -> None:
    "Against the champion, then promoted over it by a lax gate, and once more when it's champion itself."
    champion = registered(tmp_path, 1, 0.95)
    first = submit(champion, Register()).to_dict()
    assert rival(first) is None
    worse = registered(tmp_path, 2, 0.75)
    lax = Register(min_accuracy=0.5, min_macro_f1=0.5, min_class_f1=0.5)
    refused = submit(worse, lax).to_dict()
    assert refused["decision"] == "refuse"
    text, page = written(tmp_path, worse, refused)
    assert "It is less accurate than celestial/1: 75.0 % against 95.0 %, -20.0 points" in text
    figures = table_with(text, "tested by")
    p = refused["comparison"]["p"]
    assert p < 1e-9 and figures["accuracy"] == [
        "95.0 %", "75.0 %", "-20.0", figures["accuracy"][3], f"same images, p = {p:.2g}", "worse"
    ]  # fmt: skip
    low, high = (round(100 * refused["comparison"][end], 1) for end in ("low", "high"))
    assert figures["accuracy"][3] == f"{low:+.1f} to {high:+.1f}", "the gate's own interval"
    assert figures["macro F1"][-1] == "worse" and figures["calibration error"][-1] == "the same"
    assert table_with(text, "parameter") == {"train.lr": ["0.95", "0.75"]}
    assert '<td class="no">worse</td>' in page and "refused by the gate" in page
    by_hand = submit(worse, lax.model_copy(update={"not_worse_by": 0.5}), by_hand=True).to_dict()
    assert by_hand["decision"] == "promote"
    kept = submit(worse, lax.model_copy(update={"not_worse_by": 0.5})).to_dict()
    assert kept["decision"] == "keep" and rival(kept) == "celestial/1", "beside the one before it"
    assert "less accurate than celestial/1" in written(tmp_path, worse, kept)[0]


def test_no_difference_is_reported_as_none(home: Path, tmp_path: Path) -> None:
    submit(registered(tmp_path, 1, 0.95), Register())
    other = np.arange(200) < 190
    other[[3, 195]] = ~other[[3, 195]]  # one lost, one gained
    alike = registered(tmp_path, 2, other)
    verdict = submit(alike, Register()).to_dict()
    since = against_version(read_version(alike), Evidence.load(published(alike)), verdict)
    assert since is not None and since.accuracy.verdict == "the same" and since.accuracy.p == 1.0
    assert "It is as accurate as celestial/1" in in_short(read_version(alike), verdict, since)[1]


# -------------------------------------------------------------------------------------------- beside a revision


def fill(root: Path, name: str, right: float, lr: float) -> Path:
    "A run's folder, as far as a report reads it."
    folder = package(root / "output" / name, right)
    about = read_json(folder / "model.json")
    wrong = round((1 - right) * 200)
    about["metrics"]["confused"] = [{"label": "Mars", "predicted": "Moon", "images": wrong, "share": 0.1}]
    write_json(folder / "model.json", about)
    write_json(folder / "metrics.json", about["metrics"])
    write_json(folder / ".inputs/params.json", {"seed": 7, "train": {"lr": lr}})
    reasons = ["accuracy is what it is", "it passes all 1 rules, and there was no champion before"]
    rule = {"name": "accuracy", "kind": "floor", "passed": True, "why": reasons[0], "value": right, "limit": 0.5}
    told = {"model": "celestial/9", "decision": "promote", "promoted": True, "reasons": reasons, "rules": [rule]}
    write_json(folder / "register.json", told | {"champion": None, "comparison": None})
    return folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A project in git whose main branch keeps the run default, 95 % right; since then it was run again, 75 % right."
    root = tmp_path / "project"
    shutil.copytree(ROOT / "params", root / "params")
    shutil.copy(ROOT / "pipeline.yaml", root)
    fill(root, "default", 0.95, 0.003)
    git(root.parent, "init", "--quiet", "--initial-branch", "main", str(root))
    git(root, "add", "params", "pipeline.yaml", "output/default/metrics.json")
    git(root, "commit", "--quiet", "--message", "a run worth keeping")
    shutil.rmtree(root / "output")
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path / "no-home"))
    monkeypatch.chdir(root)
    return root


def celestial(*arguments: object) -> Result:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_a_changed_parameter_and_a_worse_accuracy_are_reported(repository: Path) -> None:
    fill(repository, "default", 0.75, 0.1)
    done = celestial("report", "default", "--base", "main")
    assert done.exit_code == 0, done.output
    commit = git(repository, "rev-parse", "main")
    assert done.output.startswith(f"## default against main ({commit[:7]}): worse")
    assert table_with(done.output, "parameter")["train.lr"] == ["0.003", "0.1"]
    figures = table_with(done.output, "tested by")
    assert figures["accuracy"][:3] == ["95.0 %", "75.0 %", "-20.0"] and figures["accuracy"][-2:] == [
        "intervals",
        "worse",
    ]
    assert "by the intervals of both: their answers to the same images aren't at hand" in done.output
    assert table_with(done.output, "truth") == {"Mars": ["Moon", "10", "50", "+40"]}
    assert "**Gate.** It became champion" in done.output and "![" not in done.output


def test_available_answers_are_compared_in_pairs(repository: Path) -> None:
    "Kept by another run here, or by the revision itself."
    fill(repository, "default", 0.93, 0.003)
    by_intervals = json.loads(celestial("report", "--base", "main", "--json").output)[0]["comparison"]
    assert (by_intervals["figures"][0]["how"], by_intervals["figures"][0]["verdict"]) == (
        "intervals",
        "no clear difference",
    )
    fill(repository, "kept", 0.95, 0.003)
    paired = json.loads(celestial("report", "--base", "main", "--json").output)[0]["comparison"]
    assert paired["how"].startswith("paired, on the same 200 images") and paired["figures"][0]["p"] == pytest.approx(
        2 * 2**-4
    )
    shutil.copy(repository / "output/kept" / EVIDENCE, repository / "output/default-answers.npz")
    shutil.rmtree(repository / "output/kept")
    mine = (repository / "output/default" / EVIDENCE).read_bytes()
    shutil.move(repository / "output/default-answers.npz", repository / "output/default" / EVIDENCE)
    git(repository, "add", "--force", f"output/default/{EVIDENCE}")
    git(repository, "commit", "--quiet", "--message", "its answers")
    (repository / "output/default" / EVIDENCE).write_bytes(mine)
    assert json.loads(celestial("report", "--base", "HEAD", "--json").output)[0]["comparison"] == paired | {
        "theirs": "HEAD"
    }


def test_missing_files_are_errors_without_a_traceback(repository: Path) -> None:
    for arguments, said in {
        ("report",): "there is no run 'default' yet",
        ("report", "--base", "main"): "there is no run 'default' yet",
        ("report", "nonsense"): "there is no run 'nonsense' yet",
    }.items():
        done = celestial(*arguments)
        assert done.exit_code == 2 and said in done.output and "celestial run" in done.output, done.output
    fill(repository, "default", 0.75, 0.1)
    fill(repository, "mine", 0.75, 0.1)
    for arguments, said in {
        ("report", "--base", "mian"): "there is no revision 'mian' here",
        ("report", "--base", "--output=x"): "there is no revision '--output=x' here",
        ("report", "mine", "--base", "main"): "has no results/mine/metrics.json",
        ("report", "mien"): "did you mean 'mine'",
        ("report", "--output", "x.pdf"): "ends in .md or .html",
    }.items():
        done = celestial(*arguments)
        assert done.exit_code == 2 and said in done.output, done.output
    assert celestial("report", "mine", "--base", "main:default").exit_code == 0


def test_parameters_of_an_older_schema_are_shown_as_written(repository: Path) -> None:
    (repository / "params/default.yaml").write_text("train: {lr: 0.003, wheels: 4}")
    git(repository, "commit", "--quiet", "--message", "before the schema changed", "params")
    fill(repository, "default", 0.95, 0.003)
    text = celestial("report", "--base", "main").output
    assert "Its parameters are shown as written" in text and table_with(text, "parameter")["train.wheels"] == ["4", "–"]


def test_the_page_has_both_sides_pictures(repository: Path) -> None:
    fill(repository, "default", 0.93, 0.003)
    fill(repository, "kept", 0.95, 0.003)
    done = celestial(
        "report", "default", "kept", "--base", "main:default", "--output", "all.html", "--output", "all.md"
    )
    assert done.exit_code == 0 and "look:  all.html, all.md" in done.output, done.output
    page, text = Path("all.html").read_text(), Path("all.md").read_text()
    assert page.count("data:image/webp") == 2 * 3 and "://" not in page and len(page) < 2_000_000
    assert text.count("## ") == 2 and "## kept against main:default" in text and "the same" in text
    one = report_page(repository, [compare_run(repository, "kept", "main:default")]).html()
    assert one.count("<figure") == 3 and page.count("<section") == 2


def test_data_robustness_size_and_latency_are_in_the_report(repository: Path) -> None:
    "Images under DVC and those of the run, damaged pictures, and what the model costs."
    first = fill(repository, "default", 0.93, 0.003)
    damaged = {"mean_accuracy": 0.9, "per_corruption": {"fog": [0.9, 0.7], "jpeg": [1.0, 1.0]}}
    for path in (first / "metrics.json", first / "model.json"):
        about = read_json(path)
        about.get("metrics", about)["robustness"] = damaged
        write_json(path, about)
    write_json(first / "headline.json", {"accuracy": 0.93, "size, MB": 2.5, "latency, ms": 7.0})
    shutil.copytree(first, repository / "results/default")
    for name, shade in ("Mars/a.png", 40), ("Mars/b.png", 90), ("Moon/c.png", 200):
        (picture := repository / "data/images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(picture)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=repository, check=True)
    record(repository, "data/images")
    git(repository, "add", "--force", "results", "data", ".dvc/config")
    git(repository, "commit", "--quiet", "--message", "data")

    about = read_json(first / "model.json")
    about["metrics"]["robustness"] = {"mean_accuracy": 0.85, "per_corruption": {"fog": [0.7, 0.5]}}
    about["compression"] = {"files": {"float32": {"ms": 9.0}}}
    write_json(first / "model.json", about)
    answers = Evidence.load(first)
    label = answers.label.copy()
    label[0] = "Neptune"
    replace(answers, label=label, learned=np.array([1, 2], np.uint64)).save(first / EVIDENCE)
    (repository / "data/images/Mars/b.png").rename(repository / "data/images/Moon/b.png")
    (repository / "data/images/Mars/a.png").unlink()
    text = celestial("report", "--base", "main").output
    figures, costs = table_with(text, "tested by"), read_json(first / "model.json")
    size = (first / costs["file"]).stat().st_size / 1e6
    assert figures["size, MB"][:3] == ["2.500", f"{size:.3f}", f"{size - 2.5:+.3f}"]
    assert figures["latency, ms"][:3] == ["7.000", "9.000", "+2.000"]
    assert table_with(text, "damage") == {"fog": ["80.0 %", "60.0 %", "-20.0"], "jpeg": ["100.0 %", "–", "–"]}
    images = table_with(text, "relabelled")
    assert images["measured on"] == ["200", "200", "0", "0", "1"] and images["learned from"] == [
        "0",
        "2",
        "2",
        "0",
        "–",
    ]
    assert {row[0]: row[2] for row in tables(text)[[rows[0][0] for rows in tables(text)].index("change")][1:]} == {
        "removed": "data/images/Mars/a.png",
        "relabelled": "data/images/Moon/b.png",
    }
    told = json.loads(celestial("report", "--base", "main", "--json").output)[0]
    assert {kind: told["data"][kind] for kind in KINDS} == {"added": 0, "removed": 1, "relabelled": 1, "changed": 0}


def test_without_base_it_is_the_champion(repository: Path) -> None:
    fill(repository, "default", 0.95, 0.003)
    assert "There is no champion yet." in celestial("report").output
    told = json.loads(celestial("report", "--json").output)[0]
    assert told["base"] is None and told["comparison"] is None and told["verdict"]["decision"] == "promote"


def test_make_report_runs_and_reports_a_missing_base(repository: Path) -> None:
    "As the workflows call it: once with a base that has metrics, once with one that has none."
    fill(repository, "default", 0.75, 0.1)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, repository)
    (repository / ".venv").mkdir()
    (repository / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (repository / ".venv/.ready").touch()
    nothing = git(repository, "hash-object", "-t", "tree", "-w", "/dev/null")
    git(repository, "branch", "empty", git(repository, "commit-tree", "-m", "nothing", nothing))
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {"PYTHONPATH": str(ROOT)}
    for base, said in ("main", "## default against main"), ("empty", "> error: empty ("):
        shutil.rmtree("comparison", ignore_errors=True)
        done = subprocess.run(["make", "report", f"BASE={base}"], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = Path("comparison/report.md").read_text()
        assert text.startswith(said) and "**Gate.**" in text
    assert not Path("comparison/comparison.html").exists()


def test_the_package_ships_every_template() -> None:
    core = ROOT / "celestial_ml/core"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {path for pattern in patterns["celestial_ml.core"] for path in core.glob(pattern)}
    assert {path for path in (core / "templates").rglob("*") if path.is_file()} <= shipped


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.browser
def test_the_page_in_a_browser(smoke: Plan) -> None:
    "At a desk and on a phone, by day and by night, and on paper."
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    page_file = (ROOT / "output/default" if SCREENSHOTS else Path("output/smoke")).resolve() / "report.html"
    with chromium() as browser:
        for scheme, width in ("light", 1280), ("dark", 390):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(page_file.as_uri())
            assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"it fits {width} pixels"
            assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0 && i.alt)")
            found = axe.Axe().run(page).response["violations"]
            assert not found, [(v["id"], v["nodes"][0]["html"]) for v in found]
            if SCREENSHOTS and width > 1000:
                taken = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256)
                taken.save(SCREENSHOTS / "report.png", optimize=True)
            page.emulate_media(media="print")
            colour, ground = (
                page.evaluate(f"getComputedStyle(document.querySelector('h1')).{p}")
                for p in ("color", "backgroundColor")
            )
            assert colour == "rgb(27, 36, 54)" and ground in ("rgba(0, 0, 0, 0)", "rgb(255, 255, 255)"), "dark on paper"
    if SCREENSHOTS:
        assert (SCREENSHOTS / "report.png").stat().st_size < 200_000
