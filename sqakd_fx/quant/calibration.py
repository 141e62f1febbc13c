"""Give every quantizer its starting range from a few unlabelled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, fx

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.errors import NotFiniteError, TrainingError
from sqakd_fx.ir.batches import first_batches, rows
from sqakd_fx.ir.modes import evaluation_mode
from sqakd_fx.ir.op_table import op_of
from sqakd_fx.ir.rewriting import constant_of, node_path
from sqakd_fx.quant.average_noise import AverageNoise
from sqakd_fx.quant.input_statistics import InputStatistics, StatisticsCollector
from sqakd_fx.quant.measured_ranges import refine_ranges
from sqakd_fx.quant.output_error import weight_importance
from sqakd_fx.quant.output_gradients import Sample, felt_samples, watched
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.quant.ranges import Range

_BATCHES_TO_SEARCH = 2
_SAMPLES_TO_SEARCH = 8
"""Of each of these batches."""


@torch.no_grad()
def calibrate(
    student: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    method: str = "mse",
    on_batch: Callable[[int], None] = lambda done: None,
) -> Mapping[str, InputStatistics]:
    """Initialize and enable all quantizers of `student`, which runs in float meanwhile.

    Activations are observed on `batches` (tuples of model inputs): a sample of at most
    2^15 values a batch, and the exact extremes. Weights are read where they lie. With the method "output" ranges
    of activations are searched once more by what they do to the outputs, on a few samples of the first batches.
    Returned is what the layers read in float, by the layer's name, where the method is "output", and else nothing.

    Raises:
        SourceError: the model does not take a batch.
        TrainingError: there is no batch, or a weight or an activation holds NaN or infinity; names its layer.
    """
    for quantizer in quantizers_of(student).values():
        quantizer.enabled = False
    few: list[tuple[Tensor, ...]] = []
    with evaluation_mode(student):
        ranges, statistics = _find_ranges(student, _remembering(batches, few), method, on_batch)
        if method == "output":
            refine_ranges(student, ranges, few)
    return statistics


def _remembering(
    batches: Iterable[tuple[Tensor, ...]], few: list[tuple[Tensor, ...]]
) -> Iterator[tuple[Tensor, ...]]:
    """The same batches; some samples of the first are left in `few`."""
    seen = iter(batches)
    for batch in first_batches(seen, _BATCHES_TO_SEARCH):
        few.append(rows(batch, 0, _SAMPLES_TO_SEARCH))
        yield batch
    yield from seen


@torch.no_grad()
def recalibrate(
    student: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]], *, method: str = "mse"
) -> None:
    """Find all ranges again where the bits have changed; the student runs quantized meanwhile."""
    with evaluation_mode(student):
        _find_ranges(student, batches, method, lambda done: None)


def _find_ranges(
    student: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    method: str,
    on_batch: Callable[[int], None],
) -> tuple[dict[str, Range], Mapping[str, InputStatistics]]:
    """Start every quantizer; the ranges of activations, by quantizer's name, and what layers read where it was kept."""
    activations = {
        name: quantizer
        for name, quantizer in quantizers_of(student).items()
        if quantizer.role == "activation"
    }
    seen: dict[str, list[Sample]] = {name: [] for name in activations}
    noise = AverageNoise(student)
    collector = StatisticsCollector(noise.watching) if method == "output" else None
    count = 0
    for inputs in batches:
        with batch_named(f"batch {count} of the data", inputs):
            if collector is None:
                with watched(activations, seen):
                    noise.run(inputs)
            else:
                noise.run(inputs, collector.run)
                for name, calls in felt_samples(student, activations, inputs, count).items():
                    seen[name] += calls
        count += 1
        on_batch(count)
    if not count:
        raise TrainingError("there is no data to calibrate on: give train_data() or --data")
    statistics = collector.statistics() if collector is not None else {}
    found: dict[str, Range] = {}
    for node in student.graph.nodes:
        if node.op != "call_module" or str(node.target) in found:
            continue
        module = student.get_submodule(str(node.target))
        if isinstance(module, Quantizer):
            sample = _sample_of(module, node, student, seen, statistics)
            least_scale = noise.least_scale(node.args[0])
            found[str(node.target)] = _initialize(module, node, sample, least_scale, method)
    return {name: found[name] for name in activations if name in found}, statistics


def _sample_of(
    quantizer: Quantizer,
    node: fx.Node,
    student: fx.GraphModule,
    seen: dict[str, list[Sample]],
    statistics: Mapping[str, InputStatistics],
) -> Sample:
    """What the quantizer at `node` is to hold: a weight as it lies, or what was seen of an activation."""
    if quantizer.role == "activation":
        parts = seen.pop(str(node.target))
        weighed = [part.importance for part in parts if part.importance is not None]
        return Sample(
            torch.cat([part.values for part in parts]),
            torch.cat(weighed) if len(weighed) == len(parts) else None,
        )
    weight = constant_of(student, node.args[0])
    assert weight is not None
    layer = next(iter(node.users))
    op = op_of(layer, {})
    known = None if op is None else weight_importance(layer, op, weight, statistics)
    return Sample(weight, known)


def _initialize(
    quantizer: Quantizer, node: fx.Node, sample: Sample, least_scale: Tensor | None, method: str
) -> Range:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    try:
        return quantizer.initialize(sample.values, method, least_scale, sample.importance)
    except NotFiniteError as error:
        raise TrainingError(
            f"{_named(source)} holds {error}", node=str(source), location=code_line(source)
        ) from None


def _named(source: fx.Node) -> str:
    """What a quantizer reads, for a sentence."""
    if source.op == "get_attr":
        return f"the weight {source.target}"
    if source.op == "placeholder":
        return f"the calibration data for the input {source.target}"
    return f"the output of {node_path(source)} on the calibration data"
