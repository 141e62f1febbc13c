"""An exported file at other sizes than the example's, of the axes that the recipe frees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx

from sqakd_fx.errors import ExportError, short
from sqakd_fx.ir.other_sizes import at_other_sizes
from sqakd_fx.recipe.free_axes import FreeAxes
from sqakd_fx.source.sizes import HasExample
from sqakd_fx.validation.validate import validate
from sqakd_fx.validation.verdict import Validation


def calls_of_other_sizes(
    student: fx.GraphModule, example: Sequence[Tensor], free: FreeAxes
) -> list[tuple[Tensor, ...]]:
    """The example at each of three other choices of sizes that the student takes."""
    found = []
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    for inputs in at_other_sizes(example, free):
        try:
            with torch.no_grad():
                student(*(x.to(device) for x in inputs))
        except Exception:
            continue
        found.append(inputs)
    return found


def sizes_in_words(calls: Sequence[Sequence[Tensor]]) -> tuple[str, ...]:
    """The shapes of calls without the batch axis."""
    return tuple(
        " and ".join("×".join(map(str, x.shape[1:])) or "no axes" for x in inputs)
        for inputs in calls
    )


def with_other_sizes(
    checked: Validation,
    graphs: tuple[fx.GraphModule, fx.GraphModule],
    path: Path,
    held: HasExample,
    class_axes: Mapping[int, int] | None = None,
) -> Validation:
    """The verdict with what calls of other sizes add to it; `graphs` are the student and its integer program."""
    calls = calls_of_other_sizes(graphs[0], held.example, held.free_axes)
    if not calls:
        return checked
    failures = validate(*graphs, path, calls, class_axes).failures
    found = tuple(f"at other sizes: {one}" for one in failures if one not in checked.failures)
    return replace(
        checked,
        failures=(*checked.failures, *found),
        sizes=(*checked.sizes, *sizes_in_words(calls)),
    )


def require_other_sizes(
    graphs: tuple[fx.GraphModule, fx.GraphModule],
    path: Path,
    example: tuple[Tensor, ...],
    free: FreeAxes,
) -> None:
    """Raise ExportError where a file that holds at the example's sizes does not at others that the student takes."""
    if not any(free):
        return
    calls = calls_of_other_sizes(graphs[0], example, free)
    if not calls:
        raise ExportError(
            "the recipe frees sizes (dynamic), and the student runs at the example's only: leave them out of dynamic"
        )
    sizes = ", ".join(sizes_in_words(calls))
    try:
        failures: Sequence[str] = validate(*graphs, path, calls).failures
    except Exception as error:  # ONNX Runtime's own have no common class
        failures = (short(error),)
    if failures and not validate(*graphs, path, [example]).failures:
        raise ExportError(
            f"the recipe frees sizes (dynamic), and the file is wrong at {sizes}: {failures[0]}; leave the axis that "
            "does not fit out of dynamic"
        )
