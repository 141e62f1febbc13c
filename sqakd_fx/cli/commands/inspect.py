"""The graph of a model or a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqakd_fx.cli.arguments import check_choice, recipe_of, refuse_without_source, source_of
from sqakd_fx.cli.options import (
    OUTPUT,
    BitsOption,
    Debug,
    FormatName,
    RecipeOption,
    Settings,
    Shape,
    SourceOption,
    StageName,
    Weights,
)
from sqakd_fx.errors import RecipeError

if TYPE_CHECKING:
    from sqakd_fx.cli.graphs import Graphs


Shown = Annotated[
    str,
    typer.Argument(metavar="MODEL|RESULT|FILE", help="A model, a result folder, or an ONNX file."),
]
Stage = Annotated[
    StageName,
    typer.Option(metavar="STAGE", help="Stage of the graph: traced, folded, quantized or lowered."),
]
After = Annotated[
    str | None,
    typer.Option(metavar="PASS", help="A pass of `sqakd-fx passes`, in place of a stage."),
]
Format = Annotated[
    FormatName,
    typer.Option(
        "--format",
        metavar="FORM",
        help="Form of what is printed: table, tree, code, dot, svg or json.",
        rich_help_panel=OUTPUT,
    ),
]
Diff = Annotated[
    tuple[str, str] | None,
    typer.Option(help="Two stages or passes whose code is compared.", metavar="PLACE PLACE"),
]
Explain = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Why a node, a module or a name in the ONNX file has, or has not, a quantizer.",
    ),
]


def inspect(
    target: Shown,
    stage: Stage = "quantized",
    after: After = None,
    format_: Format = "table",
    diff: Diff = None,
    explain: Explain = None,
    recipe: RecipeOption = None,
    bits: BitsOption = None,
    set_: Settings = None,
    weights: Weights = None,
    input_shape: Shape = None,
    source: SourceOption = None,
    debug: Debug = False,
) -> None:
    """Show the graph at a stage: where quantizers stand, what stays in float, and why."""
    from sqakd_fx.cli.explain import show_explanation
    from sqakd_fx.cli.graphs import STAGES
    from sqakd_fx.cli.inspect import show_difference, show_onnx, show_stage
    from sqakd_fx.program import all_passes

    if after is not None:
        _refuse_beside_after(target, stage, diff, explain)
        check_choice("--after", after, all_passes())
    if target.endswith(".onnx"):
        show_onnx(Path(target), format_)
        return
    for place in diff or ():
        check_choice("--diff", place, [*STAGES, *all_passes()])
    options = {"--recipe": recipe, "--bits": bits, "--set": set_, "--weights": weights}
    options["--input-shape"] = input_shape
    graphs = _graphs(target, source, options)
    if diff is not None:
        show_difference(graphs, *diff)
    elif explain is not None:
        file = Path(target) / "model.onnx"
        show_explanation(graphs.program(), explain, format_, file if file.is_file() else None)
    else:
        show_stage(graphs, after or stage, format_)


def _graphs(target: str, source: str | None, options: dict[str, Any]) -> Graphs:
    """What `inspect` shows: a result folder as it lies there, or a model compiled by the options."""
    from sqakd_fx.cli.graphs import SavedGraphs, SourceGraphs
    from sqakd_fx.results.student import load_saved
    from sqakd_fx.storage import is_result_folder

    folder = Path(target)
    recipe = options["--recipe"]
    if is_result_folder(folder):
        if source is None:
            refuse_without_source(folder, options)
            return SavedGraphs(load_saved(folder), folder)
        recipe = recipe or str(folder / "recipe.toml")
    recipe_of_options = recipe_of(recipe, options["--bits"], options["--set"])
    loaded = source_of(source or target, options["--weights"], None, options["--input-shape"])
    return SourceGraphs(loaded, recipe_of_options())


def _refuse_beside_after(
    target: str, stage: str, diff: tuple[str, str] | None, explain: str | None
) -> None:
    if target.endswith(".onnx"):
        raise RecipeError(
            "--after shows a graph of a model: a pass has left nothing in an ONNX file"
        )
    beside = {"--stage": stage != "quantized", "--diff": diff, "--explain": explain}
    for option, given in beside.items():
        if given:
            raise RecipeError(f"--after and {option} ask for two things: give one of them")
