"Print what the package requires with some extras: python deploy/requirements.py train,postgres. Used by the Dockerfile."

import sys
import tomllib
from pathlib import Path


def main(extras: list[str]) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    print(*(requirement for group in groups for requirement in group), sep="\n")


if __name__ == "__main__":
    main([extra for extra in sys.argv[1].split(",") if extra])
