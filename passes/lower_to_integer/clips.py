"""Which codes a clip leaves: ReLU, ReLU6 and clamp as bounds on integers.

Rounding is monotone, so quantize(clip(x, a, b)) = clip(quantize(x), code(a), code(b)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from sqakd_fx.ir.op_table import Op
from sqakd_fx.quant.grid import Grid, encode


@dataclass(frozen=True)
class Clip:
    """The range that a fused activation leaves."""

    lower: float = float("-inf")
    upper: float = float("inf")

    def then(self, lower: float, upper: float) -> Clip:
        return Clip(min(max(self.lower, lower), upper), max(min(self.upper, upper), lower))

    @property
    def is_open(self) -> bool:
        return self == Clip()


def clip_bounds(node: fx.Node, op: Op) -> tuple[float, float] | None:
    """The bounds of a clip row of the op table; None where they are computed."""
    if op.bounds is not None:
        return op.bounds
    lower, upper = node.args[1:3]
    if not all(v is None or isinstance(v, int | float) for v in (lower, upper)):
        return None
    return (
        float("-inf") if lower is None else float(cast(float, lower)),
        float("inf") if upper is None else float(cast(float, upper)),
    )


def _code(value: float, grid: Grid) -> int:
    if value == float("inf"):
        return grid.qmax
    if value == float("-inf"):
        return grid.qmin
    return int(encode(torch.tensor(value, dtype=torch.float32), grid))


def clipped_range(grid: Grid, clip: Clip) -> tuple[int, int]:
    """Smallest and largest code that a clip leaves of a grid."""
    low, high = _code(clip.lower, grid), _code(clip.upper, grid)
    return min(max(grid.qmin, low), grid.qmax), max(min(grid.qmax, high), grid.qmin)


def is_representable(grid: Grid, lower: float, upper: float) -> bool:
    """True where both bounds are on the grid or outside its range."""
    scale = float(grid.scale)
    smallest = (grid.qmin - grid.zero_point) * scale
    largest = (grid.qmax - grid.zero_point) * scale
    return (lower <= smallest or lower == 0.0) and (upper >= largest or upper == 0.0)


def is_inside(narrow: Grid, wide: Grid) -> bool:
    """True where every code of one grid is a code of the other."""
    return wide.qmin <= narrow.qmin and narrow.qmax <= wide.qmax
