"""Hard-swish as the runtime computes it on codes: a sum that saturates, and a product.

    y = x · clip(x + 3, 0, 6) / 6          Howard et al., arXiv 1905.02244, section 5.2

The gate is x + 3 on a grid of 255 steps from 0 to 6. Codes saturate where the clip does, and a step of 6 / 255 that is
read as 1 / 255 divides by 6. Float operators between codes take twice as long in ONNX Runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.ir.integer_ops import rounded_sum
from sqakd_fx.quant.families import straight_through
from sqakd_fx.quant.grid import Grid
from sqakd_fx.quant.quantizer import Quantizer

_LARGEST = 255
THREE = Grid(torch.tensor(3 / _LARGEST, dtype=torch.float32), 0, 0, _LARGEST, 8)
"""The grid on which the largest code is 3."""
SHIFTED = Grid(torch.tensor(6 / _LARGEST, dtype=torch.float32), 0, 0, _LARGEST, 8)
"""The grid of clip(x + 3, 0, 6)."""
GATE = Grid(torch.tensor(1 / _LARGEST, dtype=torch.float32), 0, 0, _LARGEST, 8)
"""The grid of the gate: the same codes, a sixth as large."""
_GATE_STEP = float(GATE.scale)
"""A number: a step that CUDA records copies nothing to the device."""


class GatedByCodes(nn.Module):
    """Hard-swish of a tensor on the grid of `x`, with the gate at one of its 256 codes.

    Called with a float32 tensor. The gradient is that of hard-swish.
    """

    sqakd_fx_operation = "hardswish"

    def __init__(self, x: Quantizer) -> None:
        super().__init__()
        self.grids = (x,)

    def forward(self, x: Tensor) -> Tensor:
        exact = F.hardswish(x)
        (quantizer,) = self.grids
        if not quantizer.enabled:
            return exact
        with torch.no_grad():
            codes = self._trained(x) if self.training else self._exported(x, quantizer)
            gated = x * (codes.clamp(0, _LARGEST) * _GATE_STEP)
        return straight_through(gated, exact)

    @staticmethod
    def _trained(x: Tensor) -> Tensor:
        return torch.round((x + 3.0) * (_LARGEST / 6))

    @staticmethod
    def _exported(x: Tensor, quantizer: Quantizer) -> Tensor:
        """The codes of the runtime's sum, not clipped."""
        scale, zero = quantizer.scale_and_zero_point()
        largest, none = x.new_tensor(_LARGEST), x.new_tensor(0.0)
        three, shifted = (grid.scale.to(x.device) for grid in (THREE, SHIFTED))
        codes = torch.round(x / scale) + zero
        return rounded_sum(codes, scale, zero, largest, three, none, shifted, none)
