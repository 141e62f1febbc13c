"""Evaluation data: inputs to validate on, and the accuracy of several functions on its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sqakd_fx.diagnostics.source_lines import user_line
from sqakd_fx.errors import SourceError, short
from sqakd_fx.ir.outputs import predictions, tensors_of
from sqakd_fx.program import Program
from sqakd_fx.source.batches import Loading, labelled_batches
from sqakd_fx.source.inputs import TrainingInputs
from sqakd_fx.source.sizes import has_example_size, require_example_size
from sqakd_fx.source.source import Source

_VALIDATION_SAMPLES = 512


def validation_batches(
    source: Source, program: Program, inputs: TrainingInputs | None
) -> Iterator[tuple[Tensor, ...]]:
    """Evaluation inputs where there are any, else training inputs; at most 512 samples of those, of the example's size.

    Raises:
        SourceError: evaluation inputs have another size than the example.
    """
    seen = 0
    if source.eval_data is not None:
        for labelled, _ in _evaluation(source, program):
            yield labelled
        return
    if inputs is None:
        return
    for ready in inputs.epoch(0):
        if not has_example_size(program, ready):
            continue
        yield ready
        seen += len(ready[0])
        if seen >= _VALIDATION_SAMPLES:
            return


def _evaluation(source: Source, program: Program) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    assert source.eval_data is not None
    loading = Loading(batch_size=256, drop_last=False)
    for batch, target in labelled_batches(source.eval_data, source.form, loading):
        inputs = program.traced.call.flatten(batch.args, batch.kwargs)
        require_example_size(program, inputs, "evaluation data")
        yield inputs, target


def evaluate(
    source: Source, program: Program, functions: Mapping[str, Callable[..., Any]]
) -> dict[str, float] | None:
    """Top-1 in percent, or the user's metric, of several functions over the same labelled data.

    Raises:
        SourceError: the metric fails, or labels are not the class of each prediction.
    """
    if source.eval_data is None:
        return None
    outputs: dict[str, list[Tensor]] = {name: [] for name in functions}
    targets: list[Tensor] = []
    for inputs, target in _evaluation(source, program):
        targets.append(torch.as_tensor(target))
        for name, function in functions.items():
            with torch.no_grad():
                outputs[name].append(tensors_of(function(*inputs))[0].cpu())
    wanted = torch.cat(targets)
    measured = _top1 if source.metric is None else partial(_measured, source.metric)
    return {name: measured(torch.cat(parts), wanted) for name, parts in outputs.items()}


def _measured(metric: Callable[[Any, Any], float], output: Tensor, target: Tensor) -> float:
    try:
        return float(metric(output, target))
    except Exception as error:
        line = user_line(error)
        at = f", {line}" if line else ""
        raise SourceError(
            f"metric() failed ({short(error)}{at}): it is given all outputs "
            f"{tuple(output.shape)} and all targets {tuple(target.shape)}, and returns a number",
            location=line,
        ) from error


def _top1(output: Tensor, target: Tensor) -> float:
    predicted = predictions(output)
    if predicted is None:
        predicted = output.argmax(dim=1)
    if predicted.shape != target.shape:
        raise SourceError(
            f"the labels {tuple(target.shape)} are not the classes of the predictions "
            f"{tuple(predicted.shape)}: give a class index for each, or a metric(outputs, targets)"
        )
    return 100 * float((predicted == target).float().mean())
