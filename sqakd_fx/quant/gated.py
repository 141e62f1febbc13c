"""Functions that gate their own input, as the runtime computes them on codes: a gate of 256 levels, and a product.

    hard-swish(x) = x · clip(x + 3, 0, 6) / 6      Howard et al., arXiv 1905.02244, section 5.2
    SiLU(x) = x · sigmoid(x)                       Elfwing et al., arXiv 1702.03118, section 2

Float operators between codes take longer in ONNX Runtime. The gate of hard-swish is a sum, x + 3 on a grid of 255 steps
from 0 to 6: codes saturate where the clip does, and a step of 6 / 255 that is read as 1 / 255 divides by 6. The gate of
SiLU is a sigmoid between codes, which the runtime reads from a table of 256 entries.
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
"""The grid of the gate from 0 to 1: the same codes, a sixth as large."""
_GATE_STEP = float(GATE.scale)
"""A number: a step that CUDA records copies nothing to the device."""
_SIGMOID_STEP = 1 / 254
"""At which the sigmoid of 0 is a code, 127; it would lie between two at 1 / 255."""
_SCALES, _LARGEST_CHANGE, _MARGIN = 32, 1.6e-3, 3e-4
"""Scales to choose from, how far the last is below the first, and how far from a tie is far enough, in steps.

Sigmoids of two libraries differ by 1e-7, which is 3e-5 of a step.
"""


class HardSwishByCodes(nn.Module):
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


class SiluByCodes(nn.Module):
    """SiLU of a tensor on the grid of `x`, with the sigmoid at one of its 256 codes.

    Called with a float32 tensor. The gradient is that of SiLU.
    """

    sqakd_fx_operation = "silu"

    def __init__(self, x: Quantizer) -> None:
        super().__init__()
        self.grids = (x,)

    def forward(self, x: Tensor) -> Tensor:
        exact = F.silu(x)
        (quantizer,) = self.grids
        if not quantizer.enabled:
            return exact
        with torch.no_grad():
            step = _SIGMOID_STEP if self.training else self.gate().scale
            codes = torch.round(torch.sigmoid(x) / step)
            gated = x * (codes.clamp(0, _LARGEST) * step)
        return straight_through(gated, exact)

    @torch.no_grad()
    def gate(self) -> Grid:
        """The grid of the sigmoid: the first scale at which no code's sigmoid lies near a tie.

        A tie would be decided by the last bit of a runtime's sigmoid, for every value that has the code.
        """
        (quantizer,) = self.grids
        scale, zero = quantizer.scale_and_zero_point()
        codes = torch.arange(256, device=scale.device)
        wanted = torch.sigmoid((codes - zero).double() * scale.double())
        index = torch.arange(_SCALES, device=scale.device)
        scales = ((1 - index * (_LARGEST_CHANGE / _SCALES)) * _SIGMOID_STEP).float()
        steps = wanted / scales.double()[:, None]
        from_tie = (steps - steps.floor() - 0.5).abs().amin(1).clamp_max(_MARGIN)
        best = (from_tie - index * (1e-3 * _MARGIN)).argmax()
        return Grid(scales[best], 0, 0, _LARGEST, 8)


GATED = {one.sqakd_fx_operation: one for one in (HardSwishByCodes, SiluByCodes)}
"""By operation, what computes it on codes."""
