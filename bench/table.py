"""The table of the benchmark: printed, kept as JSON, compared with the last committed one, and rendered into the docs."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import ABSENT, Growth, Row, Text
from celestial_ml.core.files import atomic

RESULTS = Path("bench/results")
PAGE, PLOT = Path("nbs/benchmarks.md"), Path("nbs/images/growth.png")
FELL = 0.9  # of the committed ratio, and below all that was seen in its repetitions


def figure(values: Sequence[float], unit: str) -> str:
    "A median with its unit, as a person would write it."
    value = statistics.median(values)
    if unit == "share":
        return f"{value:.1%}"
    digits = max(0, 2 - len(f"{int(abs(value))}") + (abs(value) < 1))
    return f"{value:,.{digits}f}{'' if unit.startswith('/') else ' '}{unit}"


def ratio(values: Sequence[float]) -> str:
    "How many times as good, with the spread over the repetitions."
    low, middle, high = min(values), statistics.median(values), max(values)
    digits = 0 if middle >= 20 else 1 if middle >= 3 else 2
    spread = f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else ""
    return f"{middle:.{digits}f} ×{spread}"


def cells(row: Row) -> list[str]:
    "What, ours, the peers, how many times as good, the limit, the share of it, the goals."
    goals = ([f"≥ {row.goal:g} ×"] if row.goal else []) + (
        [f"≥ {row.limit_goal:.0%} of the limit"] if row.limit_goal else []
    )
    verdict = "" if not goals else f" missed beside {', '.join(row.missed())}" if row.missed() else " reached"
    return [
        row.what,
        figure(row.ours, row.unit),
        "; ".join(f"{name} {figure(values, row.unit)}" for name, values in row.peers.items()),
        "; ".join(ratio(row.ratios(values)) for values in row.peers.values()),
        "; ".join(f"{name} {figure(values, row.unit)}" for name, values in row.limit.items()),
        "; ".join(f"{statistics.median(row.ratios(values)):.0%}" for values in row.limit.values()),
        ", ".join(goals) + verdict,
    ]


def growth_cells(growth: Growth) -> list[str]:
    "What, the sizes, the seconds, the exponent, the goal."
    reached = "reached" if max(growth.exponent, growth.last) <= growth.goal else "missed"
    sizes = [f"{size:,}" for size in growth.sizes]
    seconds = [f"{one:.3g} s" for one in growth.seconds]
    return [
        growth.what,
        ", ".join(sizes),
        ", ".join(seconds),
        f"{growth.exponent:.2f}, at the end {growth.last:.2f}",
        f"≤ {growth.goal} {reached}",
    ]


def print_rows(rows: Sequence[Row | Growth | Text]) -> None:
    "For a terminal: a block a row, so that it fits any width."
    for row in rows:
        if isinstance(row, tuple):
            print(f"  {row[0]}\n      " + "; ".join(part for part in row[1:] if part))
        elif isinstance(row, Growth):
            what, *parts = growth_cells(row)
            print(f"  {what}\n      " + ": ".join(parts[:2]) + f"; exponent {parts[2]}, {parts[3]}")
        else:
            what, ours, *_, share, goal = cells(row)
            print(f"  {what}: {ours}")
            for name, values in row.peers.items():
                print(f"      {ratio(row.ratios(values))} as good as {name} ({figure(values, row.unit)})")
            for name, values in row.limit.items():
                print(f"      {share} of the limit: {name} ({figure(values, row.unit)})")
            if goal:
                print(f"      goal {goal}" + (f": {row.why}" if row.missed() and row.why else ""))
    sys.stdout.flush()


def machine() -> dict[str, str | int]:
    "What a figure was measured on."
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def keep(section: str, rows: Sequence[Row | Growth | Text]) -> None:
    "Write a section's figures to `bench/results`."
    RESULTS.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"section": section, "date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": machine()}
    about["absent"] = dict(ABSENT)
    kinds = {"rows": Row, "growth": Growth}
    tables = {name: [asdict(row) for row in rows if isinstance(row, kind)] for name, kind in kinds.items()}  # type: ignore[call-overload]
    with atomic(RESULTS / f"{section}.json") as f:
        f.write_text(json.dumps(about | _rounded(tables), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _rounded(value: object) -> object:
    "Four digits are more than any of these figures has."
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read(text: str) -> list[Row | Growth]:
    "The rows of a section's JSON."
    stored = json.loads(text)
    return [*(Row(**row) for row in stored["rows"]), *(Growth(**row) for row in stored["growth"])]


def committed(section: str) -> list[Row | Growth]:
    "The rows of the last commit; none where there are none."
    shown = subprocess.run(["git", "show", f"HEAD:./{RESULTS}/{section}.json"], capture_output=True, text=True)
    return read(shown.stdout) if shown.returncode == 0 else []


def what_fell(before: Sequence[Row | Growth], after: Sequence[Row | Growth]) -> list[str]:
    "Ratios, never times, that are worse than the committed ones by more than their spread; for every row, a line each."
    earlier, fell = {(type(row), row.what): row for row in before}, []
    for row in after:
        old = earlier.get((type(row), row.what))
        if isinstance(row, Growth) and isinstance(old, Growth):
            if row.exponent > max(row.goal, old.exponent + 0.05):
                fell.append(f"{row.what}: exponent {row.exponent:.2f}, was {old.exponent:.2f}")
        elif isinstance(row, Row) and isinstance(old, Row):
            was = old.peers | old.limit
            for name, values in (row.peers | row.limit).items():
                if name in was:
                    now, then = statistics.median(row.ratios(values)), old.ratios(was[name])
                    if now < FELL * statistics.median(then) and now < min(then):
                        fell.append(f"{row.what}, beside {name}: {ratio([now])}, was {ratio(then)}")
    return fell


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def render() -> str:
    "The page of the documentation, out of `bench/results`."
    from bench.__main__ import SECTIONS

    stored = {name: RESULTS / f"{name}.json" for name in SECTIONS}
    texts = {name: path.read_text(encoding="utf-8") for name, path in stored.items() if path.exists()}
    parts = [INTRODUCTION]
    growth: list[list[str]] = []
    for name, text in texts.items():
        about, rows = json.loads(text), read(text)
        measured = [row for row in rows if isinstance(row, Row)]
        growth += [growth_cells(row) for row in rows if isinstance(row, Growth)]
        if measured:
            on = about["machine"]
            head = ["", "ours", "peers", "times as good", "limit", "share of it", "goal"]
            parts.append(f"## {SECTIONS[name].title}\n\n{_table(head, [cells(row) for row in measured])}")
            whys: dict[str, list[str]] = {}
            for row in measured:
                if row.missed() and row.why:
                    whys.setdefault(row.why, []).append(row.what)
            parts += [f"*{'*, *'.join(missed)}*: {why}" for why, missed in whys.items()]
            parts.append(
                f"`python -m bench {name}`, {about['date']}, revision {about['commit']}, {on['cores']} cores of {on['cpu']}, "
                f"Python {on['python']}."
                + "".join(f" Absent: {peer} ({why})." for peer, why in about["absent"].items())
            )
    if growth:
        head = ["", "sizes", "seconds", "exponent", "goal"]
        parts.append(f"## Growth\n\n{_table(head, growth)}\n\n![Seconds by size](images/growth.png)")
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# Benchmarks

Each row is the same piece of work, done in several ways in the same run, in turn: a ratio holds on other machines, a time
does not. *Times as good* is the median over the repetitions, with the lowest and the highest; above 1 means that this project
is quicker, or smaller. The *limit* is what no implementation can leave out, measured in the same run. Peers live in
environments of their own, with the packages that `bench/peer` lists: in `.cache/bench`, or in the folder that
`BENCH_ENVIRONMENTS` names, and made where they are missing. Where a peer had to be written, `bench/peer` has it, as its
documentation describes it; one that was absent is named below its table.

`make bench` measures all, `make bench QUICK=1` a small part of it, with the environments that exist and without keeping its figures,
and `python -m bench serving --times=3 --params=guide` a section. A ratio that has fallen behind the committed one is printed at
the end, and the command ends with 1."""


def plot_growth() -> None:
    "Seconds by size, of all that was measured in several sizes."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for path in sorted(RESULTS.glob("*.json")) for row in read(path.read_text()) if isinstance(row, Growth)]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row in rows:
        axes.loglog(row.sizes, row.seconds, "o-", label=f"{row.what} (exponent {row.exponent:.2f})")
    axes.set(xlabel="images", ylabel="seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PLOT, dpi=120)
    plt.close(figure)


def publish() -> None:
    "Write the page and the plot."
    plot_growth()
    with atomic(PAGE) as f:
        f.write_text(render(), encoding="utf-8")
