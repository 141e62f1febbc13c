"""The last lines of a run: the file, its size, accuracy, speed, and what to do next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sqakd_fx.diagnostics.terminal import cells, console
from sqakd_fx.diagnostics.wording import printable
from sqakd_fx.results.figures import figures, lost_accuracy, packed_estimate


def print_closing(report: Mapping[str, Any], file: Path, command: Sequence[str]) -> None:
    """What is slow, what was checked, the figures, the next commands; `command` is the model with its options."""
    answer = console(file=sys.stdout)
    if report.get("slower_than_float"):
        answer.print(printable(report["slower_than_float"]))
    for line in report["validation_lines"]:
        answer.print(f"- {printable(line)}")
    answer.print()
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in closing(report, file, command):
        table.add_row(*cells(label, text))
    answer.print(table)


def closing(report: Mapping[str, Any], file: Path, command: Sequence[str]) -> list[tuple[str, str]]:
    """Label and text of each closing line."""
    lines = figures(report, file)
    again = f"sqakd-fx quantize {shlex.join(command)}"
    if lost_accuracy(report):
        lines.append(("nearer", f"{again} --for accuracy, or docs/when-accuracy-drops.md"))
    smaller = packed_estimate(report, bits=4)
    if smaller is not None:
        lines.append(("smaller", f"about {smaller / 1024:.0f} KiB: {again} --for size"))
    lines.append(("run it", f"python {shlex.quote(str(file.parent / 'deploy.py'))}"))
    lines.append(("report", str(file.parent / "report.md")))
    lines.append(("charts", f"sqakd-fx report {shlex.quote(str(file.parent))} --open"))
    return lines
