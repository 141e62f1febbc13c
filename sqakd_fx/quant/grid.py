"""Integer grids: which real numbers a quantized tensor can hold, and their codes.

    code  = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)
    value = (code - zero_point) * scale

Everything is computed in float32, in this order, so that a runtime that follows the ONNX
definition of QuantizeLinear gives the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The codes a tensor may take and what they stand for.

    Attributes:
        scale: float32, shape () per tensor or (channels,) per channel; positive.
        zero_point: the code of the real number 0.
        qmin, qmax: the smallest and largest code in use (inclusive).
        bits: nominal bits, for reports; `qmax - qmin + 1 <= 2**bits` unless codes are odd only.
        axis: the channel axis of a per-channel scale, None per tensor.
    """

    scale: Tensor
    zero_point: int
    qmin: int
    qmax: int
    bits: int
    axis: int | None = None

    def same_as(self, other: Grid) -> bool:
        """True where a code means the same number on both grids (their ranges may differ)."""
        return (
            self.zero_point == other.zero_point
            and self.axis == other.axis
            and torch.equal(self.scale, other.scale)
        )


def along_axis(scale: Tensor, axis: int | None, ndim: int) -> Tensor:
    """Reshape a per-channel vector so that it broadcasts along `axis` of an `ndim` tensor."""
    if axis is None or scale.ndim == 0:
        return scale
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def encode(x: Tensor, grid: Grid) -> Tensor:
    """Integer codes (int32) of a real tensor of any shape."""
    scale = along_axis(grid.scale, grid.axis, x.ndim)
    return (torch.round(x / scale) + grid.zero_point).clamp(grid.qmin, grid.qmax).to(torch.int32)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Real values (float32) of integer codes."""
    scale = along_axis(grid.scale, grid.axis, codes.ndim)
    return (codes.to(torch.float32) - grid.zero_point) * scale
