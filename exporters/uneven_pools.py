"""Adaptive average pools whose windows differ in size, in a few operations for any number of windows.

torch takes one apart into a sum of as many terms as the largest window has values, which is an operation for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from onnxscript import opset21 as op

from sqakd_fx.exporters.symbolic import Value, constant
from sqakd_fx.ir.windows import adaptive_windows


def adaptive_average_pool(self: Value, output_size: Sequence[int]) -> Value:
    """AveragePool along the axes whose windows are of one size, and weighted sums along the others."""
    axes, rank = len(output_size), len(self.shape)
    sizes = list(zip((int(size) for size in self.shape[-axes:]), output_size, strict=True))
    kernel = [size // count if size % count == 0 else 1 for size, count in sizes]
    x = self
    if any(size > 1 for size in kernel):
        single = rank == axes + 1
        x = op.Unsqueeze(x, constant([0])) if single else x
        x = op.AveragePool(x, kernel_shape=kernel, strides=kernel)
        x = op.Squeeze(x, constant([0])) if single else x
    lengths: list[Any] = []
    for axis, (size, count) in zip(range(-axes, 0), sizes, strict=True):
        if size % count:
            places, inside = adaptive_windows(size, count)
            behind = [1] * (-axis - 1)
            own = constant(inside.float().reshape(*inside.shape, *behind).numpy())
            values = op.Gather(x, constant(places.numpy()), axis=rank + axis)
            x = op.ReduceSum(op.Mul(values, own), constant([rank + axis + 1]), keepdims=0)
            lengths.append(inside.sum(1).float().reshape(-1, *behind))
    return op.Div(x, constant(math.prod(lengths).numpy())) if lengths else x
