"""`passes`: what rewrites a model, in order."""

from __future__ import annotations

import json

from rich.table import Table

from sqakd_fx.diagnostics.terminal import console
from sqakd_fx.program import all_passes


def show_passes(*, as_json: bool) -> None:
    """Print every pass with its sentence and its options."""
    known = all_passes()
    if as_json:
        rows = [
            {"name": name, "does": one.sentence(), "options": one.options()}
            for name, one in known.items()
        ]
        print(json.dumps(rows, indent=2))
        return
    table = Table("pass", "what it does", "options")
    for name, one in known.items():
        table.add_row(name, one.sentence(), ", ".join(one.options()))
    console().print(table)
