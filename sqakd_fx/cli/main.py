"""The command line. torch is imported inside commands only: `--help` answers at once."""

from __future__ import annotations

import os

import typer

from sqakd_fx.cli.commands import about, inspect, quantize, results, sensitivity
from sqakd_fx.cli.friendly import friendly

COMMANDS = (
    quantize.quantize,
    inspect.inspect,
    about.passes,
    sensitivity.sensitivity,
    results.export,
    results.validate,
    about.recipes,
    about.doctor,
    about.capabilities,
)
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

app = typer.Typer(
    name="sqakd-fx",
    help="Quantize trained PyTorch models without labels, and export integer ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command()(friendly(command))


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
    app()
