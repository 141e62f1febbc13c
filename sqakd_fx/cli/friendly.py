"""What a user did wrong, in one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from sqakd_fx.cli.terminal import say
from sqakd_fx.errors import SqakdError


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
            print("sqakd-fx: stopped; nothing half-written was left", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped
