"""What is done with a finished result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sqakd_fx.cli.arguments import (
    DataOptions,
    refuse_without_source,
    result_of,
    source_of,
)
from sqakd_fx.cli.options import (
    OUTPUT,
    Data,
    Debug,
    ExportTarget,
    Json,
    ProfileName,
    ResultArgument,
    RuntimeName,
    Shape,
    SourceOption,
    Tokenizer,
    Weights,
)
from sqakd_fx.diagnostics.terminal import say
from sqakd_fx.diagnostics.wording import printable
from sqakd_fx.errors import RecipeError


def export(
    result: ResultArgument,
    profile: Annotated[
        ProfileName | None,
        typer.Option(
            metavar="FORM",
            help="Form of the file: container (INT8 weights), packed (weights at their own bits), typed, tensorrt, "
            "qonnx, encodings, float, pt2, pt2e or litert. The recipe's own where none is given.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    target: ExportTarget = None,
    int4_block: Annotated[
        int | None,
        typer.Option(
            metavar="64|128",
            help="Block of INT4 weights, for TensorRT. The recipe's own where none is given.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File; in the result folder where none is given.", rich_help_panel=OUTPUT
        ),
    ] = None,
    source: SourceOption = None,
    data: Data = None,
    weights: Weights = None,
    input_shape: Shape = None,
    debug: Debug = False,
) -> None:
    """Write the file of a result again, for another target or in another form."""
    from sqakd_fx.program import lower
    from sqakd_fx.recipe.resolution import resolve_recipe
    from sqakd_fx.results.export import export as write
    from sqakd_fx.results.export import export_saved
    from sqakd_fx.results.file_names import exported_file
    from sqakd_fx.results.student import load_saved, load_student

    if profile is not None and target is not None:
        raise RecipeError("--target and --profile each say what is written: give one of them")
    if source is None:
        given = {"--weights": weights, "--data": data, "--input-shape": input_shape}
        refuse_without_source(result, given)
        saved = load_saved(result)
        saved = replace(saved, recipe=resolve_recipe(saved.recipe, int4_block=int4_block))
        path = out or result / exported_file(profile, target, saved.recipe.target)
        exported = export_saved(saved, path, profile=profile, target=target)
    else:
        program = load_student(result, source_of(source, weights, data, input_shape))
        program = replace(program, recipe=resolve_recipe(program.recipe, int4_block=int4_block))
        path = out or result / exported_file(profile, target, program.recipe.target)
        lowered = lower(program.student).graph_module
        exported = write(program, lowered, path, profile=profile, target=target)
    for note in exported.notes:
        say(f"note: {note}")
    say(f"wrote {exported.path}")


def validate(
    target: Annotated[
        Path,
        typer.Argument(metavar="RESULT|FILE", help="A result folder, or an ONNX file in one."),
    ],
    source: SourceOption = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    weights: Weights = None,
    input_shape: Shape = None,
    runtime: Annotated[
        RuntimeName,
        typer.Option(metavar="NAME", help="What runs the file: onnxruntime, or openvino as well."),
    ] = "onnxruntime",
    per_tensor: Annotated[
        bool,
        typer.Option("--per-tensor", help="List every quantized tensor.", rich_help_panel=OUTPUT),
    ] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the exported file with the trained graph again; exit status 1 where it differs.

    The student is that of the folder. Without --data its example inputs are taken, and samples drawn for it.
    """
    from sqakd_fx.cli.validate import validate_saved, validate_with_source
    from sqakd_fx.results.markdown import tensor_table, validation_lines

    folder, path = result_of(target)
    if source is None:
        refuse_without_source(folder, {"--weights": weights, "--input-shape": input_shape})
        checked = validate_saved(folder, path, data, runtime, tokenizer)
    else:
        said = DataOptions(tokenizer=tokenizer)
        loaded = source_of(source, weights, data, input_shape, said)
        checked = validate_with_source(folder, path, loaded, runtime)
    if json_:
        print(json.dumps(checked.as_dict(), indent=2))
    else:
        if per_tensor:
            say(tensor_table(checked))
        say("\n".join(map(printable, validation_lines(checked))))
    if checked.failures:
        raise typer.Exit(1)
