"""Inputs that a recipe names, each by its name or a glob."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from sqakd_fx.diagnostics.wording import did_you_mean
from sqakd_fx.errors import RecipeError


def inputs_called(pattern: str, inputs: Iterable[str], key: str) -> list[str]:
    """The inputs that `pattern` names in the recipe's `key`; raises RecipeError where there is none."""
    known = list(inputs)
    matched = [name for name in known if fnmatchcase(name, pattern)]
    if not matched:
        hint = did_you_mean(pattern, known, cutoff=0.4) or f"choose {', '.join(known)}"
        raise RecipeError(f"{key} names an input {pattern!r} that the model has not: {hint}")
    return matched
