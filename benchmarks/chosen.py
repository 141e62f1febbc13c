"""The rows of a table that globs of the command line name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence


def chosen(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    """The names that some glob matches, in their order.

    Raises:
        SystemExit: a glob matches none; with the names there are.
    """
    known = list(names)
    for glob in globs:
        if not fnmatch.filter(known, glob):
            raise SystemExit(f"{glob!r} matches nothing; there are {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatch(name, glob) for glob in globs)]
