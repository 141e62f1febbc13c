"""`recipes`: presets and the keys of a recipe."""

from __future__ import annotations

from rich.table import Table

from sqakd_fx.cli.recipe_keys import recipe_keys
from sqakd_fx.diagnostics.terminal import console, say
from sqakd_fx.recipe.presets import preset_names, when_to_use
from sqakd_fx.recipe.resolution import resolve_recipe, to_toml


def show_presets() -> None:
    """Print the presets, each with a line on when it is used."""
    table = Table("preset", "when to use it", box=None, pad_edge=False)
    for name in preset_names():
        table.add_row(name, when_to_use(name))
    answer = console()
    answer.print(table)
    answer.print(
        "\nAny wNaM with N and M from 1 to 8 works. `sqakd-fx recipes NAME` prints one as TOML, "
        "`sqakd-fx recipes --keys` lists the keys."
    )


def show_preset(name: str) -> None:
    """Print a preset as TOML."""
    say(to_toml(resolve_recipe(name)), end="")


def show_keys() -> None:
    """Print every key: its values and default on one line, its sentence on the next."""
    answer = console()
    for key in recipe_keys():
        answer.print(f"{key.name}: {key.values}; default {key.default}")
        answer.print(f"    {key.sentence}")
