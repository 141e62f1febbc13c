"""Give every quantizer its starting range from a few unlabelled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.errors import NotFiniteError, TrainingError
from sqakd_fx.ir.rewriting import constant_of, node_path
from sqakd_fx.quant.average_noise import AverageNoise
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.quant.sampling import spread_sample

_SAMPLES_PER_BATCH = 1 << 15


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
    seen: dict[str, list[Tensor]] = {}
    handles = [
        quantizer.register_forward_pre_hook(_collector(seen.setdefault(name, [])))
        for name, quantizer in quantizers_of(student).items()
        if quantizer.role == "activation"
    ]
    noise = AverageNoise(student)
    count = 0
    try:
        for inputs in batches:
            with batch_named(f"batch {count} of the data", inputs):
                noise.run(inputs)
            count += 1
            on_batch(count)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise TrainingError("there is no data to calibrate on: give train_data() or --data")
    found: set[str] = set()
    for node in student.graph.nodes:
        if node.op != "call_module" or str(node.target) in found:
            continue
        module = student.get_submodule(str(node.target))
        if isinstance(module, Quantizer):
            _initialize(module, str(node.target), node, student, seen, noise, method)
            found.add(str(node.target))
    student.train(was_training)


def _initialize(
    quantizer: Quantizer,
    name: str,
    node: fx.Node,
    student: fx.GraphModule,
    seen: dict[str, list[Tensor]],
    noise: AverageNoise,
    method: str,
) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if quantizer.role == "weight":
        sample = constant_of(student, source)
        assert sample is not None
    else:
        sample = torch.cat(seen.pop(name))
    try:
        quantizer.initialize(sample, method, noise.least_scale(source))
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


def _collector(into: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].detach().float().reshape(-1)
        sample = spread_sample(flat[None], _SAMPLES_PER_BATCH)[0]
        into.append(torch.cat([sample, flat.amin().reshape(1), flat.amax().reshape(1)]))

    return collect
