"A copy of the project, to run and to change at will."

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "pipeline.yaml",
    "pipeline.monitor.yaml",
    "pipeline.score.yaml",
    "pipeline.stress.yaml",
    "pipeline.tune.yaml",
    "dvc.yaml",
    "params",
    "nbs",
    "celestial_ml",
    ".gitignore",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvcignore",
    "data/raw.dvc",
)
Celestial = Callable[..., subprocess.CompletedProcess]


def guide_folder() -> Path | None:
    "Where the guide's images are, None where nowhere."
    places = [os.environ.get("CELESTIAL_GUIDE_DATA"), ROOT / "data/raw", ROOT.parent / "shared/data/celestial"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


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


def snapshot(folder: Path) -> Path:
    "A repository with what is here, committed or not, to clone from."
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        source, target = ROOT / name, folder / name
        if name and (source.is_file() or source.is_symlink()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "as it is"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder
