"The table of the benchmark: its ratios, its goals, what fell, and the page of the documentation."

import json
from pathlib import Path

import pytest

import bench
from bench import Growth, Row, in_turn
from bench.__main__ import SECTIONS
from bench.table import RESULTS, cells, growth_cells, read, render, what_fell

ROOT = Path(__file__).resolve().parents[1]


def test_times_and_rates_are_as_good_as_their_unit_says() -> None:
    seconds = Row("x", "s", [1.0, 2.0], {"peer": [2.0, 6.0]}, {"limit": [0.5, 1.0]}, goal=2.0, limit_goal=0.6)
    assert seconds.ratios([2.0, 6.0]) == [2.0, 3.0] and seconds.missed() == ["limit"]
    assert Row("x", "/s", [100.0], {"peer": [50.0]}, goal=2.5).missed() == ["peer"]
    assert seconds.ratios([3.0]) == [2.0], "medians, where the counts of repetitions differ"


def test_a_row_shows_spread_share_and_verdict() -> None:
    row = Row("x", "s", [1.0, 2.0, 4.0], {"peer": [4.0, 4.0, 4.0]}, {"limit": [1.0, 1.0, 1.0]}, goal=1.5)
    assert cells(row) == ["x", "2.0 s", "peer 4.0 s", "2.00 × (1.00 to 4.00)", "limit 1.0 s", "50%", "≥ 1.5 × reached"]


def test_a_way_that_never_works_is_beaten_and_only_goals_are_missed() -> None:
    never = Row("x", "share", [0.9], {"peer": [0.0]}, goal=1.0)
    assert never.ratios([0.0]) == [float("inf")] and never.missed() == [] and cells(never)[-1] == "≥ 1 × reached"
    assert cells(Row("x", "s", [2.0], {"peer": [1.0]}))[-1] == "", "no goal, no verdict"


def test_a_peer_without_an_environment_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setenv("BENCH_QUICK", "1")
    monkeypatch.setattr(bench, "ABSENT", {})
    assert bench.environment("evidently") is None and list(bench.ABSENT) == ["evidently"]
    (tmp_path / "evidently").mkdir()
    (tmp_path / "evidently/ready").write_text((bench.PEER / "evidently.txt").read_text())
    assert bench.environment("evidently") == tmp_path / "evidently/bin/python"


def test_ways_take_turns() -> None:
    order: list[str] = []
    in_turn(2, a=lambda: order.append("a") or 0.0, b=lambda: order.append("b") or 0.0)  # type: ignore[func-returns-value]
    assert order == ["a", "b", "b", "a"]


@pytest.mark.parametrize(("now", "fell"), [(0.5, True), (0.95, False), (3.0, False)])
def test_only_a_ratio_below_all_that_was_seen_fell(now: float, fell: bool) -> None:
    "A machine that is twice as slow changes both ways alike, and isn't a fall."
    before = [Row("x", "s", [1.0, 1.0, 1.0], {"peer": [1.0, 1.1, 0.9]})]
    after = [Row("x", "s", [20.0], {"peer": [20.0 * now]}), Row("new", "s", [1.0], {"peer": [0.1]})]
    assert bool(what_fell([*before, Growth("x", [1, 10], [1.0, 9.0])], after)) == fell, (
        "a row and its growth share a name"
    )


def test_an_exponent_is_a_slope() -> None:
    assert Growth("x", [10, 100, 1000], [1.0, 10.0, 100.0]).exponent == pytest.approx(1)
    assert growth_cells(Growth("x", [1, 10, 100], [1.0, 1.0, 20.0]))[-1].endswith("missed"), "a start hides nothing"
    worse = Growth("x", [10, 100, 1000], [1.0, 20.0, 400.0])
    assert what_fell([Growth("x", [10, 100, 1000], [1.0, 10.0, 100.0])], [worse])


def test_the_page_is_that_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert (ROOT / "nbs/benchmarks.md").read_text() == render(), "run `python -m bench --publish`"
    for path in RESULTS.glob("*.json"):
        assert path.stem in SECTIONS and json.loads(path.read_text())["machine"]["cores"] and read(path.read_text())
