"""What there is: presets, passes, packages, kernels."""

from __future__ import annotations

from typing import Annotated

import typer

from sqakd_fx.cli.options import Debug
from sqakd_fx.cli.terminal import say


def recipes(
    name: Annotated[str | None, typer.Argument(help="print this preset as TOML")] = None,
    debug: Debug = False,
) -> None:
    """List the presets, or print one as TOML."""
    from sqakd_fx.presets import preset_names
    from sqakd_fx.recipe import resolve_recipe, to_toml

    if name is None:
        print("\n".join(preset_names()))
        print("\nany wNaM with N, M from 1 to 8 works; `sqakd-fx recipes NAME` prints one as TOML")
    else:
        say(to_toml(resolve_recipe(name)), end="")


def passes(
    json_: Annotated[bool, typer.Option("--json", help="print the list as JSON")] = False,
    debug: Debug = False,
) -> None:
    """List the passes in the order in which they run, what each does, and its options."""
    from sqakd_fx.cli.passes import show_passes

    show_passes(as_json=json_)


def doctor(debug: Debug = False) -> None:
    """Versions, devices, ONNX Runtime providers, compiler, and what each missing thing costs."""
    from sqakd_fx.cli.doctor import show_doctor

    show_doctor()


def capabilities(
    json_: Annotated[bool, typer.Option("--json", help="print the answers as JSON")] = False,
    debug: Debug = False,
) -> None:
    """The targets, and what the installed ONNX Runtime runs on integer kernels, in float, or refuses."""
    from sqakd_fx.runtime import capabilities as asked

    if json_:
        asked.main()
    else:
        from sqakd_fx.cli.doctor import show_capabilities

        show_capabilities()
