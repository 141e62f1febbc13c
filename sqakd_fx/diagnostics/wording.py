"""Parts of error messages about files and names."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

from sqakd_fx.errors import SourceError

_SPELT_OUT = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of control and format characters, lone surrogates, and separators of lines."""


def printable(text: str) -> str:
    """`text` on one line, with what would move a cursor, colour a terminal or turn the writing round spelt out.

    ESC becomes \\x1b, and a line's end becomes \\n.
    """
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _SPELT_OUT else c for c in text)


def no_effect(key: str, why: str) -> str:
    """What a user is told where a setting of the recipe changes nothing."""
    return f"{key} has no effect: {why}"


def did_you_mean(name: str, known: Collection[str], *, cutoff: float = 0.6) -> str:
    """ "did you mean A or B?" of the known names that are like `name`, or ""."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else ""


def near_names(path: Path) -> str:
    """ "did you mean …" from the deepest folder of `path` that exists, or ""."""
    while path.parent != path and not path.parent.is_dir():
        path = path.parent
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(str(path.parent / name) for name in near)}" if near else ""


def require_exists(path: Path, option: str) -> None:
    if not path.exists():
        raise SourceError(f"{option} {path} is not there: {near_names(path) or 'check the path'}")


def first_of(names: Sequence[str], most: int) -> str:
    """ "a, b and 3 more": at most `most` of the names."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


def with_article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
