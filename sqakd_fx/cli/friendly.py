"""What a user did wrong, in one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer
from typer.core import TyperGroup

from sqakd_fx.cli.stopping import STOPPED
from sqakd_fx.diagnostics.terminal import say
from sqakd_fx.errors import SqakdError

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Of click, which some versions of Typer hold within themselves."""


class Commands(TyperGroup):
    """The commands of the program; a mistake in the options is one sentence, as every other mistake is."""

    def main(self, *args: Any, standalone_mode: bool = True, **settings: Any) -> Any:
        """Run a command and, where nothing else is said, end the process with its exit status."""
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **settings)
        try:
            status = run(*args, standalone_mode=False, **settings)
        except _UsageError as error:
            say(f"sqakd-fx: {_usage_sentence(error)}", file=sys.stderr)
            sys.exit(2)
        except typer.Abort:
            sys.exit(130)
        sys.exit(status if isinstance(status, int) else 0)


def _usage_sentence(error: Any) -> str:
    """What click says of an option, and where help is."""
    said = " ".join(error.format_message().split()).replace(": Value error,", ":").rstrip(".")
    where = "sqakd-fx" if error.ctx is None else error.ctx.command_path
    return f"{said[:1].lower()}{said[1:]}: see `{where} --help`"


def friendly(command: Callable[..., Any]) -> Callable[..., Any]:
    """One sentence on stderr and exit status 2 for what is the input's fault; 130 for Ctrl-C."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except SqakdError as error:
            if kwargs.get("debug"):
                raise
            say(f"sqakd-fx: {error}", file=sys.stderr)
            raise typer.Exit(130 if type(error).__name__ == "Interrupted" else 2) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            if kwargs.get("debug") or error.filename is None:
                raise
            say(
                f"sqakd-fx: {str(error.filename)[:200]} cannot be used ({error.strerror}): check the path",
                file=sys.stderr,
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print(STOPPED, file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped
