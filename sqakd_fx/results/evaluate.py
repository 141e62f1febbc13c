"""Evaluation data: samples to validate on, and what outputs score on its labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sqakd_fx.diagnostics.batch_errors import batch_named, require_finite
from sqakd_fx.diagnostics.source_lines import user_line
from sqakd_fx.errors import SourceError, short
from sqakd_fx.frontend.output_kinds import class_axes
from sqakd_fx.ir.outputs import tensors_of
from sqakd_fx.program import Program, with_labels
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.source.batches import Loading, evaluation_batches
from sqakd_fx.source.inputs import TrainingInputs, first_no_class
from sqakd_fx.source.sizes import (
    batch_size_of,
    has_example_size,
    require_batch_size,
    require_example_size,
)
from sqakd_fx.source.source import Source

_VALIDATION_SAMPLES = 512
_SAMPLES_AT_ONCE = 256


def validation_batches(
    source: Source, program: Program, inputs: TrainingInputs | None
) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    """Evaluation inputs and their labels where there are any, else training inputs and None.

    Of training inputs at most 512 samples, of the example's size.

    Raises:
        SourceError: evaluation inputs have another size than the example, or a batch is not finite.
    """
    seen = 0
    if source.eval_data is not None:
        yield from _evaluation(source, program)
        return
    if inputs is None:
        return
    for index, ready in enumerate(inputs.epoch(0)):
        if not has_example_size(program, ready):
            continue
        require_finite(ready, f"batch {index} of the data")
        yield ready, None
        seen += len(ready[0])
        if seen >= _VALIDATION_SAMPLES:
            return


def _evaluation(source: Source, program: Program) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    assert source.eval_data is not None
    fixed = program.traced.fixed_batch
    loading = Loading(batch_size_of(program) if fixed else _SAMPLES_AT_ONCE, drop_last=fixed)
    batches = evaluation_batches(source.eval_data, source.form, loading)
    labelled = None
    for index, (batch, target) in enumerate(batches):
        if labelled is not None and labelled != (target is not None):
            raise SourceError(
                f"batch {index} of the evaluation data has {'no ' * labelled}labels, unlike those in front of it: "
                "give labels with all batches, or with none"
            )
        labelled = target is not None
        inputs = program.traced.call.flatten(batch.args, batch.kwargs)
        require_finite(inputs, f"batch {index} of the evaluation data")
        require_batch_size(program, inputs, "evaluation data")
        require_example_size(program, inputs, "evaluation data")
        yield inputs, target


def with_evaluation(
    source: Source, program: Program, recipe: Recipe, on_note: Callable[[str], None]
) -> Program:
    """The program with what the first labels say of its outputs, once they and the metric have fit the float model.

    Without labels it is the program as it was, and `on_note` is told.

    `recipe` is the one that the program was built from.

    Raises:
        SourceError: the data, the metric or the labels do not fit the model.
    """
    if source.eval_data is None:
        return program
    inputs, target = next(_evaluation(source, program))
    with batch_named("the first batch of the evaluation data", inputs), torch.no_grad():
        output = program.teacher(*inputs)
    if target is None:
        if source.metric is not None:
            raise SourceError(
                "metric() needs labels, and the evaluation data has none: give (inputs, labels) batches, or leave "
                "metric() out"
            )
        on_note(
            "the evaluation data has no labels: the file is compared with the float model on it"
        )
        return program
    tensors, labels = tensors_of(output), plain_labels(target)
    labelled = with_labels(program, labels, recipe, tensors)
    if source.metric is not None:
        try:
            _measured(source.metric, _like(output, tensors), labels)
        except SourceError:  # it may need all samples, as a retrieval among them does
            _try_on_all(source, labelled)
    else:
        _top1(tensors[0], labels, class_axes(labelled.outputs).get(0))
    return labelled


def _try_on_all(source: Source, program: Program) -> None:
    """Raise SourceError where the metric fails on what the float model makes of all samples."""
    outputs, labels = [], []
    for inputs, target in _evaluation(source, program):
        labels.append(plain_labels(target))
        with torch.no_grad():
            outputs.append([x.cpu() for x in tensors_of(program.teacher(*inputs))])
    scores(source, program, {"float": outputs}, labels)


def scores(
    source: Source,
    program: Program,
    outputs: Mapping[str, Sequence[Sequence[Tensor]]],
    labels: Sequence[Any],
) -> dict[str, float]:
    """Top-1 in percent, or the user's metric, of outputs by name, each batch by batch, on the labels of all batches.

    The metric is given what the model returns, with the samples of all batches in each tensor, and the targets
    likewise.

    Raises:
        SourceError: the metric fails, or labels are not the class of each prediction.
    """
    with torch.no_grad():
        returned = program.teacher(*program.example)
    wanted = tree_map(lambda *parts: _joined(parts), *labels)
    axis = class_axes(program.outputs).get(0)
    found = {}
    for name, parts in outputs.items():
        tensors = [_joined(one) for one in zip(*parts, strict=True)]
        found[name] = (
            _top1(tensors[0], wanted, axis)
            if source.metric is None
            else _measured(source.metric, _like(returned, tensors), wanted)
        )
    return found


def plain_labels(target: Any) -> Any:
    """Labels of any structure, their numbers and arrays as tensors; others, such as texts, as they are."""

    def as_tensor(leaf: Any) -> Any:
        try:
            return torch.as_tensor(leaf)
        except (TypeError, ValueError, RuntimeError):
            return leaf

    return tree_map(as_tensor, target)


def _joined(parts: Sequence[Any]) -> Any:
    """The tensors of all batches as one; others as a list."""
    if not all(isinstance(part, Tensor) for part in parts):
        return list(parts)
    return torch.cat(list(parts)) if parts[0].ndim else torch.stack(list(parts))


def _like(returned: Any, tensors: Sequence[Tensor]) -> Any:
    """`tensors` in the structure of what the model returns."""
    leaves, structure = tree_flatten(returned)
    given = iter(tensors)
    return tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], structure)


def _measured(metric: Callable[[Any, Any], float], output: Any, target: Any) -> float:
    try:
        score = float(metric(output, target))
        if math.isnan(score):
            raise ValueError("it gave NaN")
        return score
    except Exception as error:
        line = user_line(error)
        at = f", {line}" if line else ""
        raise SourceError(
            f"metric() failed ({short(error)}{at}): it is given all outputs {_said(output)} and all targets "
            f"{_said(target)}, and returns a number",
            location=line,
        ) from error


def _said(value: Any) -> str:
    """Shapes in the place of tensors."""
    return str(tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, value))


def _top1(output: Tensor, target: Any, axis: int | None) -> float:
    predicted = output.argmax(dim=min(1, output.ndim - 1) if axis is None else axis)
    if not isinstance(target, Tensor) or predicted.shape != target.shape:
        raise SourceError(
            f"the labels {_said(target)} are not the classes of the predictions "
            f"{tuple(predicted.shape)}: give a class index for each, or a metric(outputs, targets)"
        )
    count = output.shape[min(1, output.ndim - 1) if axis is None else axis]
    stranger = first_no_class(target, count)
    if stranger is not None:
        raise SourceError(
            f"the labels of the evaluation data hold {stranger:g}, and the model has the classes 0 to "
            f"{count - 1}: give a class index for each, or a metric(outputs, targets) that leaves others out"
        )
    return 100 * float((predicted == target).float().mean())
