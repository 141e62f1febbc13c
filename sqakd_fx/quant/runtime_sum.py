"""A sum of two tensors on grids as the runtime rounds it.

    trained:   round((a s_a + b s_b) / s)          program and runtime:   round(a s_a / s + b s_b / s)

In real numbers the two are one; in float32 a pair of codes whose sum lies halfway between two codes may fall to
either side, and with few bits such a pair is frequent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqakd_fx.ir.integer_ops import rounded_sum
from sqakd_fx.quant.families import straight_through
from sqakd_fx.quant.quantizer import Quantizer

KERNEL = "QLinearAdd"
"""The kernel whose rounding this is."""


class RuntimeSum(nn.Module):
    """a + b; in evaluation at the code that the runtime gives it on the grid behind the sum.

    Called with two float32 tensors that broadcast, on the grids of `a` and `b`. The code is not clipped yet, and
    the gradient is that of a + b.
    """

    sqakd_fx_operation = "add"

    def __init__(self, a: Quantizer, b: Quantizer, out: Quantizer) -> None:
        super().__init__()
        self.grids = (a, b, out)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = a + b
        if self.training or not all(quantizer.enabled for quantizer in self.grids):
            return total
        with torch.no_grad():
            (a_scale, a_zero), (b_scale, b_zero), (scale, zero) = (
                quantizer.scale_and_zero_point() for quantizer in self.grids
            )
            codes = rounded_sum(
                torch.round(a / a_scale) + a_zero,
                a_scale,
                a_zero,
                torch.round(b / b_scale) + b_zero,
                b_scale,
                b_zero,
                scale,
                zero,
            )
            rounded = (codes - zero) * scale
        return straight_through(rounded, total)
