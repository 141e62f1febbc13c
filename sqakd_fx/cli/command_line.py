"""The command line as it was written."""

from __future__ import annotations

import shlex
from typing import Any

import typer


def as_written(context: typer.Context) -> str:
    """The command with the arguments and options that were given, quoted for a shell."""
    words = ["sqakd-fx", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            words += _words(parameter, context.params[name])
    return shlex.join(words)


def _words(parameter: Any, value: Any) -> list[str]:
    """One parameter of click's: an argument, a flag, an option, or one that is given several times."""
    if parameter.param_type_name == "argument":
        return [str(value)]
    option = max(parameter.opts, key=len)
    if getattr(parameter, "is_flag", False):
        return [option]
    several = value if parameter.multiple else [value]
    return [word for one in several for word in (option, str(one))]
