"""What the actions of our workflows do, as far as they need it here: artifacts and caches are folders, the rest is written down.

act_actions.py ACTION PHASE, in a job's folder; inputs are in the environment, as the runner gives them.
"""

import json
import os
import shutil
import subprocess
import sys
from glob import glob, has_magic
from pathlib import Path

STORE = Path(os.environ["ACT_STORE"])


def given(name: str, default: str = "") -> str:
    "An input."
    return os.environ.get(f"INPUT_{name.upper()}", "").strip() or default


def files_of(pattern: str, hidden: bool) -> list[Path]:
    "The files of a pattern, those of a folder too; without hidden ones, as upload-artifact."
    found = [Path(one) for one in glob(pattern.rstrip("/"))]  # noqa: PTH207
    files = [path for one in found for path in ([one] if one.is_file() else one.rglob("*")) if path.is_file()]
    return [path for path in files if hidden or not any(part.startswith(".") for part in path.parts)]


def fixed(pattern: str) -> Path:
    "The part of a pattern before its first wildcard: where a search begins."
    parts = Path(pattern).parts
    return Path(*parts[: next((i for i, part in enumerate(parts) if has_magic(part)), len(parts))])


def upload() -> None:
    "Names in an artifact begin below what all searches have in common."
    patterns = given("path").split("\n")
    roots = [fixed(pattern) for pattern in patterns]
    root = Path(os.path.commonpath([Path.cwd() / one for one in roots])).relative_to(Path.cwd())
    root = root.parent if root.is_file() else root
    target = STORE / "artifacts" / given("name")
    files = {one for pattern in patterns for one in files_of(pattern, given("include-hidden-files") == "true")}
    if target.exists():
        sys.exit(f"there is an artifact {target.name}")
    for path in files:
        (target / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / path.relative_to(root))


def restore() -> None:
    "What was saved by the key, else the newest whose key begins with one of the others."
    saved = sorted((STORE / "caches").glob("*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for key in [given("key"), *given("restore-keys").split("\n")]:
        for one in saved:
            if one.name == key or (key and key != given("key") and one.name.startswith(key)):
                return shutil.copytree(one, ".", dirs_exist_ok=True) and None


def save() -> None:
    target = STORE / "caches" / given("key")
    if not target.exists():
        target.mkdir(parents=True)
        for name in given("path").split("\n"):
            if Path(name).exists():
                shutil.copytree(name, target / name)


def checkout() -> None:
    "act copies the clone, unless a job asks for a commit."
    if given("ref"):
        for words in (["init", "-q"], ["fetch", "-q", STORE / "clone", given("ref")], ["checkout", "-q", "FETCH_HEAD"]):
            subprocess.run(["git", *words], check=True)


def main(action: str, phase: str) -> None:
    does = {
        ("actions/checkout", "main"): checkout,
        ("actions/upload-artifact", "main"): upload,
        ("actions/download-artifact", "main"): lambda: shutil.copytree(
            STORE / "artifacts" / given("name"), given("path", "."), dirs_exist_ok=True
        ),
        ("actions/cache", "main"): restore,
        ("actions/cache", "post"): save,
        ("actions/cache/restore", "main"): restore,
        ("actions/cache/save", "main"): save,
    }
    does.get((action, phase), lambda: None)()
    inputs = {name[6:].lower(): value for name, value in os.environ.items() if name.startswith("INPUT_") and value}
    if phase == "main":
        with (STORE / "calls.jsonl").open("a") as file:
            file.write(json.dumps({"job": os.environ["GITHUB_JOB"], "action": action} | inputs) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
