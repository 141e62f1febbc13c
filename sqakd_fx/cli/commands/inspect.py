"""The graph of a model or a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqakd_fx.cli.arguments import check_choice, recipe_of, refuse_without_source, source_of
from sqakd_fx.cli.options import (
    BitsOption,
    Debug,
    RecipeOption,
    Settings,
    Shape,
    SourceOption,
    Weights,
)
from sqakd_fx.errors import RecipeError

if TYPE_CHECKING:
    from sqakd_fx.cli.graphs import Graphs


def inspect(
    target: Annotated[str, typer.Argument(help="SOURCE, a result folder, or FILE.onnx")],
    stage: Annotated[str, typer.Option(help="traced, folded, quantized or lowered")] = "quantized",
    after: Annotated[
        str | None, typer.Option(help="a pass of `sqakd-fx passes`, in place of a stage")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="table, tree, code, dot, svg or json")
    ] = "table",
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(help="two stages or passes to compare", metavar="PLACE PLACE"),
    ] = None,
    explain: Annotated[
        str | None, typer.Option(help="a node or module: why it has, or has not, a quantizer")
    ] = None,
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
    from sqakd_fx.cli.inspect import FORMATS, show_difference, show_onnx, show_stage
    from sqakd_fx.program import all_passes

    if after is not None:
        _refuse_beside_after(target, stage, diff, explain)
        check_choice("--after", after, all_passes())
    if target.endswith(".onnx"):
        show_onnx(Path(target), format_)
        return
    check_choice("--stage", stage, STAGES)
    check_choice("--format", format_, FORMATS)
    for place in diff or ():
        check_choice("--diff", place, [*STAGES, *all_passes()])
    options = {"--recipe": recipe, "--bits": bits, "--set": set_, "--weights": weights}
    options["--input-shape"] = input_shape
    graphs = _graphs(target, source, options)
    if diff is not None:
        show_difference(graphs, *diff)
    elif explain is not None:
        show_explanation(graphs.program(), explain, format_)
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
