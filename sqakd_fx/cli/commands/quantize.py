"""The main job."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqakd_fx.cli.arguments import DataOptions, data_of, dynamic_of, recipe_of, source_of
from sqakd_fx.cli.command_line import as_written
from sqakd_fx.cli.options import (
    OUTPUT,
    TRAINING,
    BitsOption,
    Crop,
    Data,
    Debug,
    DeviceName,
    Dynamic,
    Goal,
    Mean,
    RecipeOption,
    Resize,
    Settings,
    Shape,
    SourceArgument,
    Std,
    Target,
    Tokenizer,
    TransformName,
    Weights,
    WithoutData,
)
from sqakd_fx.diagnostics.terminal import say
from sqakd_fx.errors import RecipeError, short

if TYPE_CHECKING:
    from sqakd_fx.results.result import Result
    from sqakd_fx.training.live import Live

Steps = Annotated[
    int | None,
    typer.Option(
        help="Training steps, in place of epochs; 0 calibrates only.", rich_help_panel=TRAINING
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(help="Passes over the training data.", rich_help_panel=TRAINING),
]
Device = Annotated[
    DeviceName | None,
    typer.Option(
        help="Where training runs. auto takes a GPU where there is one.",
        rich_help_panel=TRAINING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Number from which the order of samples and every random choice follow.",
        rich_help_panel=TRAINING,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Result folder; sqakd-out/NAME-RECIPE where none is given.", rich_help_panel=OUTPUT
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the last checkpoint in the result folder.",
        rich_help_panel=TRAINING,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Begin anew where a stopped run lies in the result folder: its checkpoints are deleted.",
        rich_help_panel=TRAINING,
    ),
]
Dump = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the graph as it is after every pass, one text file a pass.",
        rich_help_panel=OUTPUT,
    ),
]


def quantize(
    context: typer.Context,
    source: SourceArgument,
    data: Data = None,
    data_free: WithoutData = False,
    transform: TransformName = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
    tokenizer: Tokenizer = None,
    weights: Weights = None,
    input_shape: Shape = None,
    goal: Goal = None,
    recipe: RecipeOption = None,
    bits: BitsOption = None,
    set_: Settings = None,
    target: Target = None,
    dynamic: Dynamic = None,
    steps: Steps = None,
    epochs: Epochs = None,
    device: Device = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    dump: Dump = None,
    debug: Debug = False,
) -> None:
    """Quantize a trained model with unlabelled inputs, and write integer ONNX; in 8 bits by default."""
    fields = {"epochs": epochs, "steps": steps, "device": device, "seed": seed, "target": target}
    preset = _one_of(goal, recipe, bits)
    recipe_of_options = recipe_of(preset, bits, set_, **fields, **dynamic_of(dynamic))
    said = DataOptions(transform, mean, std, resize, crop, tokenizer)
    from sqakd_fx.training.live import Live

    with Live() as live:
        live.stage("load", source)
        from sqakd_fx.pipeline import run
        from sqakd_fx.results.folder import default_folder

        loaded = source_of(source, weights, data_of(data, data_free), input_shape, said)
        resolved = recipe_of_options()
        result = run(
            loaded,
            resolved,
            out or default_folder(loaded.name, resolved),
            resume=resume,
            force=force,
            dump=dump,
            observer=live,
            command=as_written(context),
        )
        if result is None:
            return
        _draw(result.model_path.parent, live)
    given = said.given() | {"--data": data, "--weights": weights, "--input-shape": input_shape}
    _close(result, [source, *["--data-free"] * data_free, *_written(given, dynamic or [])])


def _written(given: Mapping[str, object], dynamic: Sequence[str]) -> list[str]:
    """The options that have a value, as on a command line."""
    pairs = [*given.items(), *(("--dynamic", axes) for axes in dynamic)]
    return [text for name, value in pairs if value for text in (name, str(value))]


def _close(result: Result, command: list[str]) -> None:
    """Print the last lines; exit status 1 where the file differs from the trained graph."""
    from sqakd_fx.cli.closing import print_closing

    print_closing(result.report, result.model_path, command)
    if result.validation.failures:
        say(f"sqakd-fx: validation failed: {result.validation.failures[0]}", file=sys.stderr)
        raise typer.Exit(1)


def _draw(folder: Path, live: Live) -> None:
    """The page with charts, where plotly is installed; a result without it is whole as well."""
    if find_spec("plotly") is None:
        return
    live.stage("draw", "the page with charts")
    from sqakd_fx.report.page import write_page

    try:
        write_page(folder)
    except Exception as error:
        live.note(
            f"report.html is not written ({short(error)}): `sqakd-fx report` with the folder tries again"
        )


def _one_of(goal: str | None, recipe: str | None, bits: str | None) -> str | None:
    """What names the recipe: a goal, or a preset or file."""
    if goal is not None and (recipe or bits):
        raise RecipeError("--for chooses the bits, as --recipe and --bits do: give one of them")
    return goal or recipe
