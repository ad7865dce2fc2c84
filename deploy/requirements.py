"Print what the package requires with some extras: python deploy/requirements.py train,postgres. Used by the Dockerfile."

import sys
import tomllib
from pathlib import Path


def main(extras: list[str]) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    left_out = "tensorflow-cpu" if "gpu" in extras else None  # both are the package `tensorflow`: one would overwrite the other
    print(*(one for group in groups for one in group if not left_out or not one.startswith(left_out)), sep="\n")


if __name__ == "__main__":
    main([extra for extra in sys.argv[1].split(",") if extra])
