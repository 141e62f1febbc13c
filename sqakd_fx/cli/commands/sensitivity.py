"""What each layer's bits cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqakd_fx.cli.arguments import DataOptions, data_of, recipe_of, source_of
from sqakd_fx.cli.options import (
    BITS,
    INPUT,
    OUTPUT,
    BitsOption,
    Crop,
    Data,
    Debug,
    Json,
    Mean,
    RecipeOption,
    Resize,
    Settings,
    Shape,
    SourceArgument,
    Std,
    Tokenizer,
    TransformName,
    Weights,
    WithoutData,
)
from sqakd_fx.diagnostics.terminal import say
from sqakd_fx.errors import RecipeError

BudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="BUDGET",
        help="bits=3.2 (mean bits of weights) or size=1.5MB.",
        rich_help_panel=BITS,
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        help="File for the recipe that meets the budget; mixed.toml where none is given.",
        rich_help_panel=OUTPUT,
    ),
]
Candidates = Annotated[
    str,
    typer.Option(metavar="BITS", help="Bits of weights to choose from.", rich_help_panel=BITS),
]
Samples = Annotated[
    int, typer.Option(min=1, help="Unlabelled inputs to measure on.", rich_help_panel=INPUT)
]


def sensitivity(
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
    budget: BudgetOption = None,
    out: RecipeFile = None,
    candidates: Candidates = "2,3,4,6,8",
    samples: Samples = 128,
    json_: Json = False,
    recipe: RecipeOption = None,
    bits: BitsOption = None,
    set_: Settings = None,
    debug: Debug = False,
) -> None:
    """Rank layers by what quantizing each alone costs.

    With --budget the best bits of each layer are written as a recipe.
    """
    from sqakd_fx.mixed_precision.budget import parse_budget

    if out is not None and budget is None:
        raise RecipeError(
            "--out is the recipe that meets a budget: give --budget such as size=1.5MB as well"
        )
    path = out or Path("mixed.toml")
    limit = None if budget is None else parse_budget(budget)
    widths = _widths(candidates) if limit is not None else ()
    recipe_of_options = recipe_of(recipe, bits or (None if recipe else "w4a4"), set_)
    said = DataOptions(transform, mean, std, resize, crop, tokenizer)
    inputs = data_of(data, data_free)
    from sqakd_fx.cli.sensitivity import choose_and_write, measure_source, show
    from sqakd_fx.training.live import Live

    with Live() as live:
        live.stage("load", source)
        loaded = source_of(source, weights, inputs, input_shape, said)
        resolved = recipe_of_options()
        layers = measure_source(loaded, resolved, widths, samples, live)
    chosen = {} if limit is None else choose_and_write(resolved, layers, limit, path)
    show(layers, chosen, as_json=json_)
    if chosen and not json_:
        say(f"wrote {path}: sqakd-fx quantize {source} --recipe {path}")


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise RecipeError(f"--candidates takes bits like 2,4,8, not {text!r}") from None
    if not widths or widths[0] < 1 or widths[-1] > 8:
        raise RecipeError(f"--candidates {text}: bits run from 1 to 8")
    return widths
