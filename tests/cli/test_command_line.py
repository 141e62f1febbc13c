"""A command line is written down as it was given."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sqakd_fx.cli.command_line import as_written


def written(words: list[str]) -> str:
    app = typer.Typer()

    @app.command()
    def quantize(
        context: typer.Context,
        source: str,
        set_: Annotated[list[str] | None, typer.Option("--set")] = None,
        steps: int | None = None,
        out: Path | None = None,
        resume: Annotated[bool, typer.Option("--resume")] = False,
        goal: Annotated[str | None, typer.Option("--for")] = None,
    ) -> None:
        print(as_written(context))

    @app.command()
    def other() -> None: ...

    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.output.strip()


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "model.py"],
        ["quantize", "my model.py", "--set", "a=1", "--set", "b=x y", "--steps", "0"],
        ["quantize", "m.py", "--out", "a'b", "--resume", "--for", "size"],
    ],
)
def test_the_command_is_what_a_shell_takes_again(words: list[str]) -> None:
    assert shlex.split(written(words)) == ["sqakd-fx", *words]
