"""Text on a terminal: names of the user's and of files are shown as they are, and never change the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from sqakd_fx.diagnostics.wording import printable

_UNBOUNDED = 10_000


def console(**settings: Any) -> Console:
    """A console to which brackets and colons in a name are brackets and colons."""
    return Console(highlight=False, markup=False, emoji=False, **settings)


def wide_console() -> Console:
    """As wide as the terminal; in a file or a pipe, as wide as what is written."""
    found = console()
    return found if found.is_terminal else console(width=_UNBOUNDED)


def cells(*values: Any) -> tuple[str, ...]:
    """A row of a table."""
    return tuple(printable(str(value)) for value in values)


def say(text: str, **where: Any) -> None:
    """Print lines; what is no line and no character of a text is spelt out."""
    print("\n".join(map(printable, text.split("\n"))), **where)
