"The service under mixed attack, for a minute; and the page that says each limit, held against the code."

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from serving import tiny_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.attacks import Answer  # noqa: E402
from bench.soak import LARGE, Attack, Sample, Soak, Wait, soak  # noqa: E402
from celestial_ml.core.errors import STATUS  # noqa: E402
from celestial_ml.core.files import write_json  # noqa: E402
from celestial_ml.demo.uploads import upload_figures  # noqa: E402
from celestial_ml.monitor.log import service_log  # noqa: E402
from celestial_ml.serve.api import build_app  # noqa: E402
from celestial_ml.serve.connections import Connections  # noqa: E402
from celestial_ml.serve.settings import ServeSettings, serve_settings  # noqa: E402

OPERATIONS = (ROOT / "nbs/operations.md").read_text()


def table(heading: str) -> list[list[str]]:
    "The rows of the tables under a heading of the operations page."
    part = OPERATIONS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)
    rows = [line for table in tables for line in table.splitlines()[2:]]
    return [
        [cell.strip().replace("\0", "|") for cell in row.replace(r"\|", "\0").strip("|").split("|")] for row in rows
    ]


def is_default(cell: str, default: object) -> bool:
    "Whether a cell says a setting's default; what has none may say in words what happens then."
    cell = cell.strip("`")
    if isinstance(default, bool):
        return cell == str(default).lower()
    if isinstance(default, int | float):
        return re.fullmatch(r"[\d.]+", cell) is not None and float(cell) == default
    if default is None or default in ((), {}, ""):
        return re.fullmatch(r"[\d.]+", cell) is None
    return cell == default


SETTINGS = {row[0].strip("`").lower(): row for row in table("Settings")}


@pytest.mark.parametrize("name", ServeSettings.model_fields)
def test_the_page_lists_each_setting_with_its_default(name: str) -> None:
    assert name in SETTINGS, f"nbs/operations.md has no row `{name.upper()}` under Settings"
    default = ServeSettings.model_fields[name].get_default(call_default_factory=True)
    assert is_default(SETTINGS[name][1], default), f"its default is {default!r}"
    assert SETTINGS[name][2]


def test_the_page_lists_no_removed_setting() -> None:
    assert set(SETTINGS) == set(ServeSettings.model_fields)
    named = {name.lower() for row in table("Limits") for name in re.findall(r"`([A-Z_]+)`", " ".join(row))}
    assert named <= set(ServeSettings.model_fields)
    for _, default, setting, *_ in table("Limits"):
        if setting:
            assert default == SETTINGS[setting.strip("`").lower()][1]


LIMITS = {408, 413, 414, 429, 431, 503, 507}  # statuses that say: too much, too slow, too many
NO_LIMITS = {"no_model", "no_log", "log_unavailable", "database_unavailable", "newer_schema"}  # 503 for another reason


def refusals() -> set[tuple[int, str]]:
    'Status and code of all errors that the code makes for a client: `CelestialError(message, hint, "too_large")`.'
    calls = [
        node
        for path in (ROOT / "celestial_ml").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("CelestialError", "self.stop")
    ]
    values = [
        value for call in calls for value in (*call.args[2:3], *(k.value for k in call.keywords if k.arg == "code"))
    ]
    codes = {value.value for value in values if isinstance(value, ast.Constant)}
    assert codes - {"internal_error"} <= STATUS.keys(), "the status of these isn't in the table"
    return {(STATUS[code], code) for code in codes & STATUS.keys()}


def documented(app) -> set[tuple[int, str]]:
    "Status and code of all errors of the OpenAPI document."
    pairs = set()
    for methods in app.openapi()["paths"].values():
        for about in methods.values():
            for status, answer in about["responses"].items():
                pairs |= {(int(status), code) for code in re.findall(r"'code': '(\w+)'", str(answer))}
    return pairs


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "The service, with a prediction log."
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path))
    look = {"time": 1.0, "model": "tiny/1", "metrics": {"unknown_share": 0.1}}  # as the monitor leaves it
    write_json(tmp_path / "monitor/snapshot.json", look)
    alerts = {"rules": {"unknown": {"severity": "warning"}}, "waiting": {"log": []}}
    write_json(tmp_path / "monitor/alerts.json", alerts)
    log = service_log(serve_settings())
    app = build_app(tiny_model(tmp_path / "model"), log=log)
    Connections(app.state.service.settings, app.state.service.metrics)  # a server has them; they count themselves
    app.state.service.metrics.collect(lambda: upload_figures(None))  # and the demo's
    yield app
    app.state.service.close()
    log.close()


def test_the_page_lists_every_limit(app) -> None:
    rows = table("Limits")
    listed = {(int(status), code) for row in rows for status, code in re.findall(r"(\d{3}) `(\w+)`", row[3])}
    raised = refusals()
    assert {(413, "too_many_bytes"), (503, "busy"), (429, "too_many_requests"), (408, "too_slow")} <= raised
    needed = {(status, code) for status, code in raised | documented(app) if status in LIMITS and code not in NO_LIMITS}
    assert needed - listed == set(), "nbs/operations.md lacks these under Limits"
    assert listed - raised - documented(app) == set(), "nobody answers these any more"


def test_every_metric_of_the_page_exists(app) -> None:
    page = app.state.service.metrics.page().decode()
    measured = set(re.findall(r"^# TYPE (\w+)", page, re.MULTILINE))
    named = set(re.findall(r"`(celestial_\w+)", OPERATIONS))
    assert len(named) > 20 and named - measured == set()
    created = {name for name in measured if name.endswith("_created")}
    listed = {row[0].strip("`") for row in table("What the metrics mean")}
    assert {name for name in measured - created if name.startswith("celestial_")} - listed == set(), "rows are missing"


# ----------------------------------------------------------------------------------------------------------- the soak


def test_what_is_a_failure() -> None:
    kept = [Answer(200), Answer(400), Answer(503, {"retry-after": "1"}), Answer("closed"), Answer("silence")]
    assert not any(one.is_failure for one in kept)
    assert all(one.is_failure for one in (Answer(500), Answer(503), Answer("leak")))


@pytest.mark.parametrize(
    ("harm", "missed"),
    [
        ({}, None),
        ({"waits": [Wait("/predict, 128 px", 0, 2, 200)] * 2}, "wait"),
        ({"waits": [Wait(LARGE, 0, 9, 200)]}, None),
        ({"samples": [Sample(1, 501, 0, 30, 0, 1, 0)]}, "memory"),
        ({"samples": [Sample(1, 200, 0, 99, 0, 1, 0)]}, "descriptors"),
        ({"attacks": [Attack("paths", 0, 1, {"leak": 1}, ["leak"])]}, "5xx"),
        ({"survived": False}, "gone"),
    ],
)
def test_a_soak_is_judged(harm: dict, missed: str | None) -> None:
    good = {
        "waits": [Wait("/predict, 128 px", 0, 0.01, 200)] * 100,
        "attacks": [],
        "samples": [Sample(0, 200, 0, 30, 0, 1, 0)],
    }
    merged = {
        name: value + harm[name] if name in harm and name != "survived" else value for name, value in good.items()
    }
    seen = Soak(0, survived=harm.get("survived", True), **merged)
    verdicts = Counter(row[3] for row in seen.rows()[:5])
    names = [name for name, (value, limit) in seen.figures().items() if value > limit]
    assert (missed is None and not names) or (len(names) == 1 and missed and missed in names[0])
    assert verdicts["MISSED"] == len(names)


@pytest.mark.slow
def test_a_minute_of_mixed_attack(smoke_run: Path, tmp_path: Path) -> None:
    seen = soak(smoke_run / "output/smoke", minutes=1, root=ROOT, log=tmp_path / "log", at_once=4)
    assert len(seen.attacks) > 30 and len(seen.waits) > 200
    missed = {name: value for name, (value, limit) in seen.figures().items() if value > limit}
    assert missed == {}, (seen.failures, seen.worst(5))
