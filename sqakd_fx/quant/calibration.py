"""Give every quantizer its starting range from a few unlabelled batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.errors import NotFiniteError, TrainingError
from sqakd_fx.ir.op_table import op_of
from sqakd_fx.ir.rewriting import constant_of, node_path
from sqakd_fx.quant.average_noise import AverageNoise
from sqakd_fx.quant.input_statistics import InputStatistics, StatisticsCollector
from sqakd_fx.quant.output_error import activation_importance, spread_over, weight_importance
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.quant.sampling import spread_sample

_SAMPLES_PER_BATCH = 1 << 15


class Sample(NamedTuple):
    """Values of a tensor, float32, and what an error of each costs, of the same shape; None for all alike."""

    values: Tensor
    importance: Tensor | None


@torch.no_grad()
def calibrate(
    student: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    method: str = "mse",
    on_batch: Callable[[int], None] = lambda done: None,
) -> None:
    """Initialize and enable all quantizers of `student`, which runs in float meanwhile.

    Activations are observed on `batches` (tuples of model inputs): a sample of at most
    2^15 values a batch, and the exact extremes. Weights are read where they lie.

    Raises:
        SourceError: the model does not take a batch.
        TrainingError: there is no batch, or a weight or an activation holds NaN or infinity; names its layer.
    """
    for quantizer in quantizers_of(student).values():
        quantizer.enabled = False
    _find_ranges(student, batches, method, on_batch)


@torch.no_grad()
def recalibrate(
    student: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]], *, method: str = "mse"
) -> None:
    """Find all ranges again where the bits have changed; the student runs quantized meanwhile."""
    _find_ranges(student, batches, method, lambda done: None)


def _find_ranges(
    student: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    method: str,
    on_batch: Callable[[int], None],
) -> None:
    was_training = student.training
    student.eval()
    seen: dict[str, list[Sample]] = {}
    weighed = _importance_of_activations(student) if method == "output" else {}
    handles = [
        quantizer.register_forward_pre_hook(
            _collector(seen.setdefault(name, []), weighed.get(name))
        )
        for name, quantizer in quantizers_of(student).items()
        if quantizer.role == "activation"
    ]
    noise = AverageNoise(student)
    collector = StatisticsCollector(noise.watching) if method == "output" else None
    count = 0
    try:
        for inputs in batches:
            with batch_named(f"batch {count} of the data", inputs):
                noise.run(inputs, collector.run if collector is not None else None)
            count += 1
            on_batch(count)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise TrainingError("there is no data to calibrate on: give train_data() or --data")
    statistics = collector.statistics() if collector is not None else {}
    found: set[str] = set()
    for node in student.graph.nodes:
        if node.op != "call_module" or str(node.target) in found:
            continue
        module = student.get_submodule(str(node.target))
        if isinstance(module, Quantizer):
            sample = _sample_of(module, node, student, seen, statistics)
            _initialize(module, node, sample, noise.least_scale(node.args[0]), method)
            found.add(str(node.target))
    student.train(was_training)


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
) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    try:
        quantizer.initialize(sample.values, method, least_scale, sample.importance)
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


def _importance_of_activations(student: fx.GraphModule) -> dict[str, tuple[int, Tensor]]:
    """Channel axis and importance by quantizer, where one node calls it and only layers read that."""
    calls = [node for node in student.graph.nodes if node.op == "call_module"]
    count = Counter(str(node.target) for node in calls)
    found = {}
    for node in calls:
        module = student.get_submodule(str(node.target))
        once = count[str(node.target)] == 1
        if once and isinstance(module, Quantizer) and module.role == "activation":
            importance = activation_importance(student, node)
            if importance is not None:
                found[str(node.target)] = importance
    return found


def _collector(
    into: list[Sample], weighed: tuple[int, Tensor] | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """`weighed`: the channel axis and the importance of each channel."""

    def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float()
        flat = x.reshape(-1)
        ends = torch.stack([flat.argmin(), flat.argmax()])
        values = torch.cat([spread_sample(flat[None], _SAMPLES_PER_BATCH)[0], flat[ends]])
        importance = None
        if weighed is not None:
            axis, of_channel = weighed
            spread = spread_over(of_channel, axis, x).reshape(-1)
            importance = torch.cat(
                [spread_sample(spread[None], _SAMPLES_PER_BATCH)[0], spread[ends]]
            )
        into.append(Sample(values, importance))

    return collect
