"""What is done with a finished result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sqakd_fx.cli.arguments import (
    check_choice,
    default_file,
    refuse_without_source,
    result_of,
    source_of,
)
from sqakd_fx.cli.options import Data, Debug, Shape, SourceOption, Target, Weights
from sqakd_fx.cli.terminal import say
from sqakd_fx.diagnostics.wording import printable
from sqakd_fx.errors import RecipeError


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
        program = load_student(result, source_of(source, weights, data, input_shape))
        path = out or result / default_file(profile, target, program.recipe.target)
        lowered = lower(program.student).graph_module
        exported = write(program, lowered, path, profile=profile or None, target=target)
    for note in exported.notes:
        say(f"note: {note}")
    say(f"wrote {exported.path}")


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
    from sqakd_fx.cli.validate import validate_saved, validate_with_source
    from sqakd_fx.results.markdown import tensor_table, validation_lines

    check_choice("--runtime", runtime, ("onnxruntime", "openvino"))
    folder, path = result_of(target)
    if source is None:
        refuse_without_source(folder, {"--weights": weights, "--input-shape": input_shape})
        checked = validate_saved(folder, path, data, runtime)
    else:
        loaded = source_of(source, weights, data, input_shape)
        checked = validate_with_source(folder, path, loaded, runtime)
    if json_:
        print(json.dumps(checked.as_dict(), indent=2))
    else:
        if per_tensor:
            say(tensor_table(checked))
        say("\n".join(map(printable, validation_lines(checked))))
    if checked.failures:
        raise typer.Exit(1)
