"""What an error of one activation costs the outputs of the whole network, in the mean square.

    Σ_k E[(y_k(x + e) - y_k(x))²] / |y_k|²  ≈  Σ_i e_i² Σ_k (J_k^T J_k)_ii / |y_k|²,     J_k = ∂y_k/∂x

for small errors e of different values that are independent. The diagonal is the mean of (J^T v)² over random v of
variance 1 (Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix"), so one backward pass a
batch gives that of every tensor. The error of a value that a clip stops costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sqakd_fx.diagnostics.batch_errors import call
from sqakd_fx.errors import SourceError
from sqakd_fx.ir import meta
from sqakd_fx.ir.outputs import separated
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.quant.sampling import spread_places

_SAMPLES_PER_BATCH = 1 << 15
_LEAST_SHARE = 1e-6
"""Of the mean importance, for a value that no output feels on this batch."""


@dataclass(eq=False)
class Sample:
    """Some values of a tensor, float32, and what an error of each costs, of the same shape; None for all alike."""

    values: Tensor
    importance: Tensor | None = None


def _sampled(x: Tensor) -> tuple[Tensor, Tensor]:
    """At most 2^15 values of a tensor and its extremes, float32, and where they lie in it, flat."""
    flat = x.detach().reshape(-1).float()
    ends = torch.stack([flat.argmin(), flat.argmax()])
    places = torch.cat([spread_places(len(flat), _SAMPLES_PER_BATCH, x.device), ends])
    return flat[places], places


def felt_samples(
    student: fx.GraphModule,
    quantizers: Mapping[str, Quantizer],
    inputs: tuple[Any, ...],
    seed: int,
) -> dict[str, list[Sample]]:
    """What each quantizer reads of one batch, a sample for each call; `seed` chooses the random directions.

    Importance is None where no output has a gradient, and where an operation has none.

    Raises:
        SourceError: the model does not take the batch.
    """
    seen: dict[str, list[Sample]] = {name: [] for name in quantizers}
    parts = meta.output_parts(student.graph.output_node())
    with watched(quantizers, seen), _constant_parameters(student):
        try:
            with torch.enable_grad():
                outputs = _differentiable(call(student, *inputs), parts)
        except SourceError:  # of a batch, or of an operation that takes nothing that has a gradient
            for calls in seen.values():
                calls.clear()
            outputs = _differentiable(call(student, *inputs), parts)
        if outputs:
            _backward(outputs, seed)
    for sample in itertools.chain.from_iterable(seen.values()):
        squares = sample.importance
        if squares is not None:
            usable = bool(torch.isfinite(squares).all())
            sample.importance = squares + _LEAST_SHARE * squares.mean() if usable else None
    return seen


def _differentiable(found: Any, parts: Mapping[int, Sequence[int]]) -> list[Tensor]:
    """Outputs that have a gradient, unlike parts of one apart."""
    leaves = [y for y in tree_leaves(found) if isinstance(y, Tensor)]
    return [
        part
        for index, y in enumerate(leaves)
        if y.requires_grad and y.numel()
        for part in separated(y, parts.get(index, ()))
    ]


def _backward(outputs: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = [
        torch.randn(y.shape, generator=generator).to(y) / y.detach().norm().clamp_min(1e-12)
        for y in outputs
    ]
    with contextlib.suppress(RuntimeError):  # an operation without a derivative
        torch.autograd.backward(outputs, directions)


@contextlib.contextmanager
def watched(quantizers: Mapping[str, Quantizer], seen: dict[str, list[Sample]]) -> Iterator[None]:
    """Inside, each call of a quantizer leaves a sample; a backward pass leaves the squares of its gradients there."""
    handles = [
        quantizer.register_forward_hook(functools.partial(_watch, seen[name]))
        for name, quantizer in quantizers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(into: list[Sample], module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    values, places = _sampled(inputs[0])
    sample = Sample(values)
    into.append(sample)

    def see(gradient: Tensor) -> None:
        sample.importance = gradient.reshape(-1)[places].float().square()

    if not torch.is_grad_enabled():
        return y
    watched = y.view_as(y) if y.requires_grad else y.detach().requires_grad_()
    watched.register_hook(see)  # type: ignore[no-untyped-call]
    return watched if y.requires_grad else watched.clone()  # a leaf cannot be changed in place


@contextlib.contextmanager
def _constant_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter has a gradient: none is computed, and `grad` stays what it was."""
    learned = [one for one in module.parameters() if one.requires_grad]
    for one in learned:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in learned:
            one.requires_grad_(True)
