"""Widen and narrow the ranges of activations by what each alone does to the network's outputs, as measured.

The range that is best for small and independent errors (`output_gradients.py`) is where this starts. Errors of clipped
values are neither: those that count most are tried at other widths, one tensor at a time, and the best width is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sqakd_fx.ir import meta
from sqakd_fx.ir.outputs import relative_errors
from sqakd_fx.ir.replay import Replay
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.quant.ranges import Range

_FACTOR = 0.8
_MOST_STEPS = 5
_ENDS = ((True, True), (True, False), (False, True))
"""Whether the lower and the upper end of a range are moved."""
_LEAST_GAIN = 0.02
_LEAST_SHARE = 0.01
"""Of the squared error of all tensors: a tensor below it is not searched."""


@torch.no_grad()
def refine_ranges(
    student: fx.GraphModule, ranges: Mapping[str, Range], batches: Sequence[tuple[Any, ...]]
) -> None:
    """Search the width of each activation range that costs the outputs of `batches` much, by quantizer's name.

    All quantizers are enabled before and afterwards; meanwhile the student runs in float but for the one in question.
    """
    quantizers = quantizers_of(student)
    for quantizer in quantizers.values():
        quantizer.enabled = False
    try:
        measured = _Measured(student, batches)
        start = {name: measured.error(name, quantizers[name]) for name in ranges}
        whole = sum(error for error in start.values() if math.isfinite(error))
        for name, error in start.items():
            if error > _LEAST_SHARE * whole:
                _search(measured, name, quantizers[name], ranges[name], error)
    finally:
        for quantizer in quantizers.values():
            quantizer.enabled = True


def _search(
    measured: _Measured, name: str, quantizer: Quantizer, found: Range, error: float
) -> None:
    """Keep the range of least error: both ends, then each, nearer to zero step by step while that helps, or farther."""
    best, kept = error, found
    own = {key: value.clone() for key, value in quantizer.values.items()}
    has_two_ends = quantizer.levels.apart and bool(found.lower < 0) and bool(found.upper > 0)
    for moves_lower, moves_upper in _ENDS if has_two_ends else _ENDS[:1]:
        start = kept
        for step in (_FACTOR, 1 / _FACTOR):
            for power in range(1, _MOST_STEPS + 1):
                factor = step**power
                at = start.times(factor if moves_lower else 1.0, factor if moves_upper else 1.0)
                quantizer.start_at(at)
                tried = measured.error(name, quantizer)
                if not tried < (1 - _LEAST_GAIN) * best:
                    break
                best, kept = tried, at
    if kept is found:
        for key, value in own.items():
            getattr(quantizer, key).copy_(value)
    else:
        quantizer.start_at(kept)


class _Measured:
    """The student's values in float on some batches, and what changes with one quantizer."""

    def __init__(self, student: fx.GraphModule, batches: Sequence[tuple[Any, ...]]) -> None:
        self.parts = meta.output_parts(student.graph.output_node())
        self.calls: dict[str, list[fx.Node]] = {}
        for node in student.graph.find_nodes(op="call_module", sort=True):
            self.calls.setdefault(str(node.target), []).append(node)
        self.replays = [Replay(student) for _ in batches]
        self.wanted = [
            replay.remember(batch) for replay, batch in zip(self.replays, batches, strict=True)
        ]

    def error(self, name: str, quantizer: Quantizer) -> float:
        """Squared relative errors of the outputs with this quantizer alone, summed; infinite if one is not finite."""
        quantizer.enabled = True
        total = 0.0
        for replay, wanted in zip(self.replays, self.wanted, strict=True):
            got = replay.again(self.calls[name], replay.run_node)
            errors = relative_errors(got, wanted, self.parts)
            total += sum(error**2 for of_output in errors for error in of_output)
        quantizer.enabled = False
        return total if math.isfinite(total) else math.inf
