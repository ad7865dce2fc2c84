"""What an installation costs: seconds into an empty environment from a warm cache of downloads, and megabytes on disk.

Each is what a person types: `pip install celestial-ml`, with [train], the guide's `requirements.txt`, BentoML's own.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import Row, in_turn
from celestial_ml.core.files import project_root

GUIDE = ["tensorflow-cpu==2.21.0", "matplotlib", "pyyaml", "dvc[gs]", "bentoml", "pillow"]  # of "A guide to MLOps"


WHY = "From a warm cache, the time goes by the number of files and packages and not by their megabytes."


def installed(wanted: list[str]) -> tuple[float, float]:
    "Seconds and megabytes of an empty environment with these."
    uv = shutil.which("uv")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", *(["--without-pip"] if uv else []), folder], check=True)
        python = f"{folder}/bin/python"
        pip = [uv, "pip", "install", "-q", "--python", python] if uv else [python, "-m", "pip", "install", "-q"]
        began = time.perf_counter()
        subprocess.run([*pip, *wanted], check=True)
        took = time.perf_counter() - began
        files = [path.lstat() for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]
        return took, sum(one.st_size for one in files) / 1e6


def install_rows(times: int) -> list[Row]:
    "Time and size, serving and training, beside the guide's way."
    root, sizes = project_root(), {}
    wanted = {
        "serving": [str(root)],
        "training": [f"{root}[train]"],
        "guide": GUIDE,
        "bentoml": ["bentoml==1.4.39", "keras==3.15.1", "pillow==12.3.0", "tensorflow-cpu==2.21.0"],
    }

    def measured(name: str) -> float:
        took, sizes[name] = installed(wanted[name])
        return took

    for name in wanted:  # into the cache
        measured(name)
    took = in_turn(times, **{name: lambda name=name: measured(name) for name in wanted})
    peers = {"guide": "the guide's requirements", "bentoml": "BentoML with Keras"}
    rows = []
    for name, goal in (("serving", 3.0), ("training", None)):
        beside = {peers[one]: took[one] for one in peers if name == "serving" or one == "guide"}
        rows.append(Row(f"installation for {name}, time", "s", took[name], beside, goal=goal, why=WHY))
        beside = {peers[one]: [sizes[one]] for one in peers if name == "serving" or one == "guide"}
        rows.append(Row(f"installation for {name}, size", "MB", [sizes[name]], beside, goal=goal))
    return rows
