"""The main job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sqakd_fx.cli.arguments import recipe_of, source_of
from sqakd_fx.cli.options import (
    BitsOption,
    Data,
    Debug,
    RecipeOption,
    Settings,
    Shape,
    SourceArgument,
    Target,
    Weights,
)
from sqakd_fx.cli.terminal import say


def quantize(
    source: SourceArgument,
    recipe: RecipeOption = None,
    bits: BitsOption = None,
    set_: Settings = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the data")] = None,
    target: Target = None,
    steps: Annotated[int | None, typer.Option(help="training steps, in place of epochs")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything that is drawn")] = None,
    out: Annotated[Path | None, typer.Option(help="default: sqakd-out/NAME-RECIPE")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint")
    ] = False,
    data: Data = None,
    weights: Weights = None,
    input_shape: Shape = None,
    dump: Annotated[Path | None, typer.Option(help="write the graph after every pass here")] = None,
    debug: Debug = False,
) -> None:
    """Train a low-bit student of a float model without labels, and export it as integer ONNX."""
    recipe_of_options = recipe_of(
        recipe, bits, set_, target=target, epochs=epochs, steps=steps, device=device, seed=seed
    )
    from sqakd_fx.cli.live import Live

    with Live() as live:
        live.stage("load", source)
        from sqakd_fx.pipeline import run
        from sqakd_fx.results.folder import default_folder

        loaded = source_of(source, weights, data, input_shape)
        resolved = recipe_of_options()
        folder = out or default_folder(loaded.name, resolved)
        result = run(loaded, resolved, folder, resume=resume, dump=dump, observer=live)
    if result is None:
        return
    live.summary(result.report, folder)
    if result.validation.failures:
        say(f"sqakd-fx: validation failed: {result.validation.failures[0]}", file=sys.stderr)
        raise typer.Exit(1)
