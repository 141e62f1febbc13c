"""`compare`: results as the columns of a table."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.table import Table

from sqakd_fx.diagnostics.terminal import cells, console
from sqakd_fx.report.comparison import as_json, cautions, rows
from sqakd_fx.report.held import Held

_LABEL, _LEAST = 13, 15
"""Columns of a terminal for a label, and for a result at least."""


def show(results: Sequence[Held], *, json_: bool) -> None:
    """The table on stdout, in parts where the results do not fit beside each other; or JSON."""
    if json_:
        print(json.dumps(as_json(results), indent=2))
        return
    answer = console()
    at_once = max((answer.width - _LABEL) // _LEAST, 1)
    found = rows(results)
    for first in range(0, len(results), at_once):
        part = slice(first, first + at_once)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("", no_wrap=True)
        for one in results[part]:
            (name,) = cells(one.folder.name or one.folder)
            table.add_column(name, overflow="fold")
        for label, texts in found:
            table.add_row(*cells(label, *texts[part]))
        answer.print(table)
        answer.print()
    for caution in cautions(results):
        answer.print(f"note: {caution}")
