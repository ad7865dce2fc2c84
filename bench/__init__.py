"""What the sections of the benchmark share."""

import os
import subprocess
import sys
import time
from pathlib import Path

Row = tuple[str, str, str, str]  # what, here, beside what, the ratio
CELESTIAL = str(Path(sys.executable).with_name("celestial"))


def wall(command: list[str], **env: str) -> float:
    "Seconds that a command takes, from the shell's point of view."
    began = time.perf_counter()
    result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    took = time.perf_counter() - began
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return took
