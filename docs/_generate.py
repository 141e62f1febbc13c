"""Write the pages of docs/ that the program knows: commands.md and recipes.md.

    python docs/_generate.py

`tests/test_docs.py` compares them with what this would write.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from sqakd_fx.cli.main import COMMANDS
from sqakd_fx.cli.recipe_keys import Key, recipe_keys
from sqakd_fx.recipe.presets import preset_names, when_to_use

DOCS = Path(__file__).parent
WRITTEN_BY = "<!-- Written by `python docs/_generate.py`. -->"


def commands_page() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    lines = [
        "# Commands",
        "",
        WRITTEN_BY,
        "",
        "`sqakd-fx COMMAND --help` shows the same on a terminal. `sqakd-fx --version` shows the version.",
        "`sqakd-fx --install-completion` sets up completion in the shell, also of presets and of recipe keys.",
        "",
        "Exit codes: 0, all is well; 1, the file differs from the trained graph; 2, bad input; 130, stopped by Ctrl-C.",
    ]
    for command in COMMANDS:
        lines += ["", f"## {command.__name__}", "", *command_lines(command)]
    return "\n".join(lines) + "\n"


def command_lines(command: Callable[..., Any]) -> Iterator[str]:
    """Usage, what the command does, and a table of its options."""
    parameters = list(parameters_of(command))
    arguments = [info.metavar or name.upper() for name, info, _ in parameters if is_argument(info)]
    yield f"    sqakd-fx {' '.join([command.__name__, *arguments, '[OPTIONS]'])}"
    yield ""
    yield inspect.cleandoc(command.__doc__ or "")
    yield ""
    yield "| argument or option | what it is |"
    yield "|---|---|"
    for name, info, annotation in parameters:
        yield f"| {cell(shown(name, info, annotation))} | {cell(info.help or '')} |"


def parameters_of(command: Callable[..., Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, description and type of each parameter that is typed; Typer's context is not."""
    hints = get_type_hints(command, include_extras=True)
    for name in inspect.signature(command).parameters:
        for one in (hints[name], *get_args(hints[name])):
            if is_annotated(one):
                annotation, info, *_ = get_args(one)
                yield name, info, annotation


def is_annotated(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def is_argument(info: ArgumentInfo | OptionInfo) -> bool:
    return isinstance(info, ArgumentInfo)


def shown(name: str, info: ArgumentInfo | OptionInfo, annotation: Any) -> str:
    """How it is typed."""
    if is_argument(info):
        return f"`{info.metavar or name.upper()}`".replace("|", " or ")
    declared = [one for one in (info.default, *(info.param_decls or ())) if is_option_name(one)]
    names = ", ".join(declared or [f"--{name.strip('_').replace('_', '-')}"])
    return f"`{names}{value_of(info, annotation)}`"


def is_option_name(value: Any) -> bool:
    """Typer keeps the first name of an annotation where a default would stand."""
    return isinstance(value, str) and value.startswith("-")


def value_of(info: ArgumentInfo | OptionInfo, annotation: Any) -> str:
    """What stands behind an option: its choices, or the kind of its value."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (one for one in get_args(annotation) if one is not NoneType)
    if annotation is bool:
        return ""
    if get_origin(annotation) is Literal:
        return f" {' or '.join(get_args(annotation))}"
    kinds = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
    return f" {info.metavar or kinds.get(annotation, 'TEXT')}".replace("|", " or ")


def recipes_page() -> str:
    """The presets, and every key of a recipe."""
    keys = recipe_keys()
    presets = [name for name in preset_names() if not name.startswith("paper/")]
    return "\n".join(
        [
            "# Recipes",
            "",
            WRITTEN_BY,
            "",
            "A recipe is everything that a run can be told. It begins with a preset.",
            "A TOML file and `--set` change keys of it:",
            "",
            "    sqakd-fx quantize model.py --bits w4a8 --set steps=500 --set 'float_modules=[\"head\"]'",
            "",
            "The result folder keeps the whole recipe as `recipe.toml`, which `--recipe FILE` takes again.",
            "",
            "```toml",
            'preset = "w4a8"',
            "steps = 500",
            "",
            "[[override]]  # layers whose path matches",
            'match = "layer4.*"',
            "weight_bits = 8",
            "```",
            "",
            "## Presets",
            "",
            "| preset | when to use it |",
            "|---|---|",
            *(f"| `{name}` | {cell(when_to_use(name))} |" for name in presets),
            "| `paper/FAMILY-BITS` | the published run of a family (ewgs, pact, lsq, dorefa), to compare with |",
            "",
            "Any `wNaM` with N and M from 1 to 8 is a preset too. `sqakd-fx recipes NAME` prints one.",
            "",
            "## Keys",
            "",
            *key_table(key for key in keys if not key.name.startswith("override.")),
            "",
            "## Keys of an override",
            "",
            "`[[override]]` changes keys for some layers.",
            "Where several match a layer, the last one that sets a key counts.",
            "",
            *key_table(key for key in keys if key.name.startswith("override.")),
        ]
    ) + ("\n")


def key_table(keys: Iterator[Key]) -> Iterator[str]:
    yield "| key | values | default | what it does |"
    yield "|---|---|---|---|"
    for key in keys:
        name = key.name.removeprefix("override.")
        yield f"| `{name}` | {cell(key.values)} | {cell(key.default)} | {cell(key.sentence)} |"


def cell(text: str) -> str:
    """Text that stands in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"commands.md": commands_page, "recipes.md": recipes_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
