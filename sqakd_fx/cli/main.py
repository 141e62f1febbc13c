"""The command line. torch is imported inside commands only: `--help` answers at once.

A command has a parameter for each of its options, often more than seven.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqakd_fx.cli.terminal import say
from sqakd_fx.diagnostics.wording import printable
from sqakd_fx.errors import RecipeError, SqakdError, UnknownFamilyError

if TYPE_CHECKING:
    from sqakd_fx.cli.graphs import Graphs
    from sqakd_fx.recipe import Recipe
    from sqakd_fx.source.source import Source

app = typer.Typer(
    name="sqakd-fx",
    help="Quantize trained PyTorch models without labels, and export integer ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SourceArgument = Annotated[str, typer.Argument(help="model.py, or package.module:callable")]
Weights = Annotated[
    Path | None,
    typer.Option(help="safetensors, or a pickle of tensors only; FILE:KEY where it holds several"),
]
Data = Annotated[Path | None, typer.Option(help="folder of images, .npy or .npz")]
Shape = Annotated[str | None, typer.Option("--input-shape", help="for example 1,3,224,224")]
SourceOption = Annotated[
    str | None,
    typer.Option("--source", help="model.py of the result: it runs, as a result folder never does"),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="preset or file.toml")]
BitsOption = Annotated[str | None, typer.Option("--bits", help="for example w4a4")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe")]
Target = Annotated[
    str | None,
    typer.Option(
        help="where it will run: onnxruntime, tensorrt, openvino; `capabilities` has them"
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def _friendly(command: Callable[..., Any]) -> Callable[..., Any]:
    """One sentence on stderr and exit status 2 for what is the input's fault; 130 for Ctrl-C."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except SqakdError as error:
            if kwargs.get("debug"):
                raise
            say(f"sqakd-fx: {error}", file=sys.stderr)
            raise typer.Exit(130 if type(error).__name__ == "Interrupted" else 2) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            if kwargs.get("debug") or error.filename is None:
                raise
            say(
                f"sqakd-fx: {str(error.filename)[:200]} cannot be used ({error.strerror}): check the path",
                file=sys.stderr,
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("sqakd-fx: stopped; nothing half-written was left", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


def _source(spec: str, weights: Path | None, data: Path | None, shape: str | None) -> Source:
    from sqakd_fx.source.source import load_source

    return load_source(spec, weights=weights, data=data, input_shape=_sizes(shape))


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        sizes = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise RecipeError(f"--input-shape takes sizes like 1,3,224,224, not {text!r}") from None
    if min(sizes) < 1:
        raise RecipeError(f"--input-shape {text} has a size below 1: give positive sizes")
    return sizes


def _recipe(
    recipe: str | None, bits: str | None, settings: list[str] | None, **fields: Any
) -> Callable[[], Recipe]:
    """Gives the recipe of the options, once the model is loaded.

    A mistake is told before that, except a family that is not known: model.py may register it.
    """
    from sqakd_fx.recipe import resolve_recipe

    resolved = partial(resolve_recipe, recipe, bits=bits, settings=settings or (), **fields)
    with suppress(UnknownFamilyError), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", FutureWarning)
        resolved()
    for warning in told:
        say(f"note: {warning.message}", file=sys.stderr)
    warnings.filterwarnings("ignore", message="the recipe's key", category=FutureWarning)
    return resolved


@app.command()
@_friendly
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
    recipe_of_options = _recipe(
        recipe, bits, set_, target=target, epochs=epochs, steps=steps, device=device, seed=seed
    )
    from sqakd_fx.cli.live import Live

    with Live() as live:
        live.stage("load", source)
        from sqakd_fx.pipeline import run
        from sqakd_fx.results.folder import default_folder

        loaded = _source(source, weights, data, input_shape)
        resolved = recipe_of_options()
        folder = out or default_folder(loaded.name, resolved)
        result = run(loaded, resolved, folder, resume=resume, dump=dump, observer=live)
    if result is None:
        return
    live.summary(result.report, folder)
    if result.validation.failures:
        say(f"sqakd-fx: validation failed: {result.validation.failures[0]}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@_friendly
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
    from sqakd_fx.cli.arguments import check_choice
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
    from sqakd_fx.cli.arguments import refuse_without_source
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
    recipe_of_options = _recipe(recipe, options["--bits"], options["--set"])
    loaded = _source(source or target, options["--weights"], None, options["--input-shape"])
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


@app.command()
@_friendly
def passes(
    json_: Annotated[bool, typer.Option("--json", help="print the list as JSON")] = False,
    debug: Debug = False,
) -> None:
    """List the passes in the order in which they run, what each does, and its options."""
    from sqakd_fx.cli.passes import show_passes

    show_passes(as_json=json_)


@app.command()
@_friendly
def sensitivity(
    source: SourceArgument,
    budget: Annotated[
        str | None, typer.Option(help="bits=3.2 (mean weight bits) or size=1.5MB")
    ] = None,
    out: Annotated[Path, typer.Option(help="the recipe that meets the budget")] = Path(
        "mixed.toml"
    ),
    candidates: Annotated[str, typer.Option(help="weight bits to choose from")] = "2,3,4,6,8",
    samples: Annotated[int, typer.Option(min=1, help="unlabelled inputs to measure on")] = 128,
    json_: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
    recipe: RecipeOption = None,
    bits: BitsOption = None,
    set_: Settings = None,
    data: Data = None,
    weights: Weights = None,
    input_shape: Shape = None,
    debug: Debug = False,
) -> None:
    """Rank layers by what quantizing each alone costs; write a recipe with bits for each under a budget."""
    from sqakd_fx.mixed_precision.budget import parse_budget

    limit = None if budget is None else parse_budget(budget)
    widths = _widths(candidates) if limit is not None else ()
    recipe_of_options = _recipe(recipe, bits, set_)
    from sqakd_fx.cli.live import Live
    from sqakd_fx.cli.sensitivity import choose_and_write, measure_source, show

    with Live() as live:
        live.stage("load", source)
        loaded = _source(source, weights, data, input_shape)
        resolved = recipe_of_options()
        layers = measure_source(loaded, resolved, widths, samples, live)
    chosen = {} if limit is None else choose_and_write(resolved, layers, limit, out)
    show(layers, chosen, as_json=json_)
    if chosen and not json_:
        say(f"wrote {out}: sqakd-fx quantize {source} --recipe {out}")


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise RecipeError(f"--candidates takes bits like 2,4,8, not {text!r}") from None
    if not widths or widths[0] < 1 or widths[-1] > 8:
        raise RecipeError(f"--candidates {text}: bits run from 1 to 8")
    return widths


@app.command()
@_friendly
def export(
    result: Annotated[Path, typer.Argument(help="result folder of quantize")],
    profile: Annotated[
        str,
        typer.Option(
            help="container, packed, typed, tensorrt, qonnx, float or pt2; the target's if absent"
        ),
    ] = "",
    target: Target = None,
    out: Annotated[Path | None, typer.Option(help="file; in the result folder if absent")] = None,
    source: SourceOption = None,
    weights: Weights = None,
    data: Data = None,
    input_shape: Shape = None,
    debug: Debug = False,
) -> None:
    """Export the trained student of a result folder again, for any target or in any profile."""
    from sqakd_fx.cli.arguments import check_choice, default_file, refuse_without_source
    from sqakd_fx.exporters.profiles import PROFILES
    from sqakd_fx.program import lower
    from sqakd_fx.results.export import export as write
    from sqakd_fx.results.export import export_saved
    from sqakd_fx.results.student import load_saved, load_student
    from sqakd_fx.targets import TARGETS

    if profile:
        check_choice("--profile", profile, tuple(PROFILES))
    if target is not None:
        check_choice("--target", target, tuple(TARGETS))
    if profile and target is not None:
        raise RecipeError("--target and --profile each say what is written: give one of them")
    if source is None:
        given = {"--weights": weights, "--data": data, "--input-shape": input_shape}
        refuse_without_source(result, given)
        saved = load_saved(result)
        path = out or result / default_file(profile, target, saved.recipe.target)
        exported = export_saved(saved, path, profile=profile or None, target=target)
    else:
        program = load_student(result, _source(source, weights, data, input_shape))
        path = out or result / default_file(profile, target, program.recipe.target)
        lowered = lower(program.student).graph_module
        exported = write(program, lowered, path, profile=profile or None, target=target)
    for note in exported.notes:
        say(f"note: {note}")
    say(f"wrote {exported.path}")


@app.command()
@_friendly
def validate(
    target: Annotated[Path, typer.Argument(help="result folder, or FILE.onnx")],
    source: SourceOption = None,
    weights: Weights = None,
    data: Data = None,
    input_shape: Shape = None,
    runtime: Annotated[
        str, typer.Option(help="what runs the file beside ONNX Runtime: openvino")
    ] = "onnxruntime",
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="list every quantized tensor")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
    debug: Debug = False,
) -> None:
    """Hold the exported model against the trained graph again; exit status 1 where it differs.

    Without --source it is the student that the folder holds, on the files of --data, or on the example inputs and
    samples drawn within the trained ranges.
    """
    import json

    from sqakd_fx.cli.arguments import check_choice, refuse_without_source, result_of
    from sqakd_fx.cli.validate import validate_saved, validate_with_source
    from sqakd_fx.results.markdown import tensor_table, validation_lines

    check_choice("--runtime", runtime, ("onnxruntime", "openvino"))
    folder, path = result_of(target)
    if source is None:
        refuse_without_source(folder, {"--weights": weights, "--input-shape": input_shape})
        checked = validate_saved(folder, path, data, runtime)
    else:
        loaded = _source(source, weights, data, input_shape)
        checked = validate_with_source(folder, path, loaded, runtime)
    if json_:
        print(json.dumps(checked.as_dict(), indent=2))
    else:
        if per_tensor:
            say(tensor_table(checked))
        say("\n".join(map(printable, validation_lines(checked))))
    if checked.failures:
        raise typer.Exit(1)


@app.command()
@_friendly
def recipes(
    name: Annotated[str | None, typer.Argument(help="print this preset as TOML")] = None,
    debug: Debug = False,
) -> None:
    """List the presets, or print one as TOML."""
    from sqakd_fx.presets import preset_names
    from sqakd_fx.recipe import resolve_recipe, to_toml

    if name is None:
        print("\n".join(preset_names()))
        print("\nany wNaM with N, M from 1 to 8 works; `sqakd-fx recipes NAME` prints one as TOML")
    else:
        say(to_toml(resolve_recipe(name)), end="")


@app.command()
@_friendly
def doctor(debug: Debug = False) -> None:
    """Versions, devices, ONNX Runtime providers, compiler, and what each missing thing costs."""
    from sqakd_fx.cli.doctor import show_doctor

    show_doctor()


@app.command()
@_friendly
def capabilities(
    json_: Annotated[bool, typer.Option("--json", help="print the answers as JSON")] = False,
    debug: Debug = False,
) -> None:
    """The targets, and what the installed ONNX Runtime runs on integer kernels, in float, or refuses."""
    from sqakd_fx.runtime import capabilities as asked

    if json_:
        asked.main()
    else:
        from sqakd_fx.cli.doctor import show_capabilities

        show_capabilities()


_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


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
