"""Results beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqakd_fx.cli.options import Debug, Json
from sqakd_fx.errors import RecipeError


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT RESULT...", help="Two result folders of `sqakd-fx quantize` or more."
        ),
    ],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show two results or more in one table: score, size, time, bits, steps, data, machine."""
    if len(results) < 2:
        raise RecipeError("compare takes two result folders or more: name another one")
    from sqakd_fx.cli.compare import show
    from sqakd_fx.report.held import read_held

    show([read_held(folder) for folder in results], json_=json_)
