"A copy of the project, to run and to change at will."

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "pipeline.yaml",
    "pipeline.score.yaml",
    "pipeline.stress.yaml",
    "pipeline.tune.yaml",
    "dvc.yaml",
    "params",
    "nbs",
    "celestial_ml",
    ".gitignore",
    ".dvc/config",
    ".dvcignore",
    "data/raw.dvc",
)
Celestial = Callable[..., subprocess.CompletedProcess]


def copy_project(folder: Path) -> Path:
    "A copy of the project without what was made, to run and to change at will."
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copy2(source, target)
    return folder
