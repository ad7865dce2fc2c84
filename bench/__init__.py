"""What the sections of the benchmark share: rows of figures, and commands that are timed."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

CELESTIAL = str(Path(sys.executable).with_name("celestial"))
PEER = Path(__file__).with_name("peer")
LESS_IS_BETTER = {"s", "ms", "MB", "kB", "images"}  # units; of others more is better

T = TypeVar("T")
ABSENT: dict[str, str] = {}  # peers that weren't measured: name → why

Text = tuple[str, str, str, str]  # a row that is not a ratio: what, and three things to say about it


@dataclass
class Row:
    "One piece of work done in several ways, in turn: a figure a repetition of each."

    what: str
    unit: str
    ours: list[float]
    peers: dict[str, list[float]] = field(default_factory=dict)  # by name
    limit: dict[str, list[float]] = field(default_factory=dict)  # the one that can't be beaten, by its name
    goal: float | None = None  # at least so many times as good as every peer
    limit_goal: float | None = None  # at least this share of the limit
    why: str = ""  # a sentence where a goal is missed

    def ratios(self, other: Sequence[float]) -> list[float]:
        "How many times as good as another way, a value a repetition; where the counts differ, of the medians."
        ours = self.ours
        if len(ours) != len(other):
            ours, other = [statistics.median(ours)], [statistics.median(other)]
        pairs = zip(ours, other, strict=True) if self.unit not in LESS_IS_BETTER else zip(other, ours, strict=True)
        return [above / below if below else math.inf for above, below in pairs]

    def missed(self) -> list[str]:
        "The ways beside which a goal is missed."
        asked = [(name, values, self.goal) for name, values in self.peers.items()]
        asked += [(name, values, self.limit_goal) for name, values in self.limit.items()]
        return [name for name, values, goal in asked if goal and statistics.median(self.ratios(values)) < goal]


@dataclass
class Growth:
    "Seconds of the same work on more and more of it."

    what: str
    sizes: list[int]
    seconds: list[float]
    goal: float = 1.05  # of the exponent, at most

    @property
    def exponent(self) -> float:
        "The slope of a line through the logarithms: 1 where twice the work takes twice the time."
        import numpy as np

        return float(np.polyfit(np.log(self.sizes), np.log(self.seconds), 1)[0])

    @property
    def last(self) -> float:
        "The slope between the two largest sizes, in which the start, which every size pays once, hides least."
        return math.log(self.seconds[-1] / self.seconds[-2]) / math.log(self.sizes[-1] / self.sizes[-2])


def wall(command: Sequence[str | Path], cwd: Path | None = None, **env: str) -> float:
    "Seconds that a command takes, from the shell's point of view."
    began = time.perf_counter()
    result = subprocess.run(command, env=os.environ | env, cwd=cwd, capture_output=True, text=True)
    took = time.perf_counter() - began
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-3000:] or result.stdout[-3000:]}")
    return took


def in_turn(times: int, **ways: Callable[[], T]) -> dict[str, list[T]]:
    "What several ways of doing the same give: one after the other, again and again, as machines are noisy."
    figures: dict[str, list[T]] = {name: [] for name in ways}
    for turn in range(times):
        for name in list(ways) if turn % 2 == 0 else reversed(ways):
            figures[name].append(ways[name]())
    return figures


def environment(name: str) -> Path | None:
    """The interpreter of a peer's environment, with the packages of `bench/peer/NAME.txt`.

    It's looked for in `$BENCH_ENVIRONMENTS` (default: `.cache/bench`), and made there when it's missing, unless `BENCH_QUICK` is set.
    """
    folder = Path(os.environ.get("BENCH_ENVIRONMENTS", ".cache/bench")).resolve() / name
    python, ready, wanted = folder / "bin/python", folder / "ready", (PEER / f"{name}.txt")
    if ready.exists() and ready.read_text() == wanted.read_text():
        return python
    if os.environ.get("BENCH_QUICK"):
        ABSENT[name] = f"no environment {folder}, and a quick run makes none"
        return None
    print(f"setting up the environment of {name}: once, some minutes", flush=True)
    uv = shutil.which("uv")
    make = [uv, "venv", "-q", "--clear", "-p", sys.executable, folder] if uv else [sys.executable, "-m", "venv", folder]
    install = [uv, "pip", "install", "-q", "--python", python] if uv else [python, "-m", "pip", "install", "-q"]
    for command in (make, [*install, "-r", wanted]):
        if subprocess.run(command).returncode:
            ABSENT[name] = f"{' '.join(map(str, command))} failed"
            return None
    ready.write_text(wanted.read_text())
    return python
