"""What there is: an example, presets, passes, packages, kernels."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sqakd_fx.cli.completion import presets_like
from sqakd_fx.cli.options import Debug, Json
from sqakd_fx.diagnostics.terminal import say


def example(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where the example is written.")
    ] = Path("fashion"),
    debug: Debug = False,
) -> None:
    """Write an example to quantize: a trained network, its model.py, and images."""
    from sqakd_fx.source.example import write_example

    path = write_example(folder)
    say(f"wrote {path.parent}: quantize it by\n  sqakd-fx quantize {shlex.quote(str(path))}")


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Print this preset as TOML.", autocompletion=presets_like
        ),
    ] = None,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys", help="List every key of a recipe: its values, its default, one sentence."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """List the presets and when each is used, or print one as TOML."""
    from sqakd_fx.cli.recipes import show_keys, show_preset, show_presets

    if keys:
        show_keys()
    elif name is None:
        show_presets()
    else:
        show_preset(name)


def passes(
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes that rewrite a graph, in order, with a sentence and options for each."""
    from sqakd_fx.cli.passes import show_passes

    show_passes(as_json=json_)


def doctor(debug: Debug = False) -> None:
    """Show versions, devices and compiler, and what each missing thing costs."""
    from sqakd_fx.cli.doctor import show_doctor

    show_doctor()


def capabilities(
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show the targets, and what the installed ONNX Runtime runs in integers or in float."""
    from sqakd_fx.runtime import capabilities as asked

    if json_:
        asked.main()
    else:
        from sqakd_fx.cli.doctor import show_capabilities

        show_capabilities()
