"""ARCHITECTURE.md names what is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")


def test_the_picture_shows_the_layers_of_the_import_contract() -> None:
    """Lines of the picture between two strokes are one layer."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    wanted = [
        {room.removeprefix("sqakd_fx.") for room in re.split(r"\s*[:|]\s*", layer)}
        for layer in layers
    ]
    picture = PAGE[PAGE.index("    cli ") : PAGE.index("`passes/` and `exporters/` lie")]
    shown = [
        {line.split()[0].removesuffix(".py") for line in part.strip().splitlines()}
        for part in re.split(r"^ +│$", picture, flags=re.M)
    ]
    assert shown == wanted


def test_every_room_is_in_the_picture() -> None:
    rooms = {path.name for path in (ROOT / "sqakd_fx").iterdir() if (path / "__init__.py").exists()}
    assert {room for room in rooms if f"    {room} " not in PAGE} == set()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/]+\.py)`", PAGE)) - {"model.py"}))
def test_a_file_that_is_named_is_there(path: str) -> None:
    assert any((ROOT / folder / path).exists() for folder in (".", "sqakd_fx")), path


def test_a_function_that_is_named_is_in_the_file_named_before_it() -> None:
    table = PAGE[PAGE.index("## Where to change") : PAGE.index("## Words")]
    for path, named in re.findall(r"`([\w/]+\.py)`: (`[^|;]*)", table):
        text = (ROOT / path).read_text("utf-8")
        for name in re.findall(r"`(\w+)`", named):
            assert f"def {name}(" in text, (path, name)
