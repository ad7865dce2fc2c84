"What the tests of deployments share: which settings there are, and whether a command is one."

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from printed import command_of
from typer.core import TyperGroup

from celestial_ml.serve.settings import PREFIX, ServeSettings, serve_settings

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {f"{PREFIX}{name.upper()}" for name in ServeSettings.model_fields}
SETTINGS |= {
    name
    for path in (ROOT / "celestial_ml").rglob("*.py")
    for name in re.findall(r'"(CELESTIAL_[A-Z_]+[A-Z])"', path.read_text(encoding="utf-8"))
}


def check_settings(values: Mapping[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    "Every variable of ours is a setting, and those of the server have values that it takes; None is a secret's."
    assert {name for name in values if name.startswith("CELESTIAL_")} <= SETTINGS
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in values.items():
        if name.startswith(PREFIX) and value is not None:
            monkeypatch.setenv(name, value)
    serve_settings()


def check_command(words: Iterable[str]) -> None:
    "The words are a command of ours; an unknown option, or a wrong value, raises."
    program, *rest = words
    assert program == "celestial"
    command, name, rest = command_of(rest)
    assert not isinstance(command, TyperGroup), f"celestial {name} is a group of commands"
    command.make_context(name, rest)
