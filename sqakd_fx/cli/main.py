"""The command line. torch is imported inside commands only: `--help` answers at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from sqakd_fx.cli.commands import about, compare, inspect, quantize, report, results, sensitivity
from sqakd_fx.cli.friendly import Commands, friendly
from sqakd_fx.cli.stopping import stop_on_signals
from sqakd_fx.diagnostics.terminal import say

MAIN, RESULT, ABOUT = "Quantize", "Work with a result", "What there is"

COMMANDS: dict[Callable[..., Any], str] = {
    quantize.quantize: MAIN,
    sensitivity.sensitivity: MAIN,
    inspect.inspect: RESULT,
    report.report: RESULT,
    compare.compare: RESULT,
    results.export: RESULT,
    results.validate: RESULT,
    about.example: ABOUT,
    about.recipes: ABOUT,
    about.passes: ABOUT,
    about.capabilities: ABOUT,
    about.doctor: ABOUT,
}
"""Every command, and the group of `--help` in which it stands."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

app = typer.Typer(
    name="sqakd-fx",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command, group in COMMANDS.items():
    app.command(rich_help_panel=group)(friendly(command))


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"sqakd-fx {version('sqakd-fx')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit; `sqakd-fx doctor` shows those of all packages.",
        ),
    ] = False,
) -> None:
    """Quantize trained PyTorch models without labels, and export integer ONNX.

    First command: sqakd-fx quantize model.py. Without a model: sqakd-fx example
    """
    if context.invoked_subcommand is None:
        say(context.get_help())


def wait_without_spinning() -> None:
    """Let torch's threads sleep while they wait for one another, unless the user has said how they wait.

    Beside other busy processes threads that spin take the cores from those that they wait for. It is read when torch is
    imported.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def main() -> None:
    """Entry point of the console script."""
    wait_without_spinning()
    stop_on_signals()
    app()
