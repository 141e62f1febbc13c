"""The HTML report of a result."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from sqakd_fx.cli.options import OUTPUT, Debug, ResultArgument
from sqakd_fx.diagnostics.terminal import say


def report(
    result: ResultArgument,
    open_: Annotated[
        bool, typer.Option("--open", help="Open it in the browser.", rich_help_panel=OUTPUT)
    ] = False,
    debug: Debug = False,
) -> None:
    """Write RESULT/report.html: one offline page with charts, the graph and all figures.

    It needs the package plotly: pip install 'sqakd-fx\\[report]'.
    """
    from sqakd_fx.report.page import write_page

    path = write_page(result)
    say(f"wrote {path}")
    if open_ and not webbrowser.open(path.resolve().as_uri()):
        say(f"no browser was found: open {path.resolve()} in one")
