"""How many levels a quantizer has, and along which axis it has a range for each channel.

x86 processors without 8-bit dot products (VNNI) multiply unsigned activation codes by signed weight codes, and add two
such products in 16 bits with saturation:

    2 · 255 · 64 = 32,640 <= 32,767        2 · 255 · 127 = 64,770 > 32,767

So a weight that an 8-bit activation meets keeps its codes within ±64 (`reduced`), which is all that fits in any order:
129 levels at 8 bits. Both ends are used, so that BatchNorm may flip the signs of a channel. A grid without zero has odd
codes up to 2^bits - 1 and fits up to 6 bits. With activations of 7 bits or fewer all of INT8 fits:
2 · 127 · 127 = 32,258. Depthwise weights are not bound (`plan/weight_codes.py`).

The kernels add the products of neighbouring input channels, 2k and 2k + 1, at one place of the kernel. So weights may
take ±127 where two neighbours of one sign add up to 128 at most (`paired`, 8 bits alone): 255 · 128 = 32,640. Two
neighbours of opposite signs never overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sqakd_fx.recipe.keys import WeightRange

LARGEST_SUM = 2**15 - 1
"""Of two products that are added in 16 bits."""
LARGEST_CODE = 127
"""Of an INT8 weight: -128 stays unused, since BatchNorm may flip a sign."""
LARGEST_PAIR = 127
"""Of |a| + |b| before rounding, for neighbours of one sign: rounded they add up to 128 at most."""


@dataclass(frozen=True)
class Levels:
    """The discrete side of a quantizer.

    q runs over `span + 1` consecutive integers from `lowest` (for an activation `lowest` is minus the
    zero point and may move). `half` is 0.5 where the grid has no zero: values are (q - half) * scale.
    `apart`: of an activation, the range's two ends are chosen apart, and the codes lie where these are. Without it a
    family that learns a step alone has its codes about zero where both signs occur.
    `paired`: of a weight, neighbours of one sign along axis 1 add up to `LARGEST_PAIR` steps at most before rounding.
    """

    bits: int
    lowest: int
    span: int
    half: float
    axis: int | None
    per_sample: bool
    paired: bool = False
    apart: bool = False

    @property
    def magnitude(self) -> float:
        """Largest |value| / scale that both signs reach."""
        return self.lowest + self.span - self.half

    def reduce(self, x: Tensor, how: Callable[..., Tensor]) -> Tensor:
        """Apply a reduction per tensor (result of shape ()) or per channel (shape (channels,))."""
        if self.axis is None:
            return how(x.reshape(1, -1), dim=1).reshape(())
        return how(x.transpose(0, self.axis).reshape(x.shape[self.axis], -1), dim=1)


def largest_weight_code(weight_range: WeightRange, activation_bits: int) -> int:
    """The largest |code| that any two weights may have which meet activations of so many bits."""
    if weight_range == "full":
        return LARGEST_CODE
    return min(LARGEST_CODE, LARGEST_SUM // (2 * ((1 << activation_bits) - 1)))


def weight_levels(bits: int, largest_code: int, zero_in_grid: bool, axis: int | None) -> Levels:
    """Levels of a weight whose codes lie within ±`largest_code`, without a zero where that is wanted and fits."""
    n = 2**bits
    if bits == 8:
        return Levels(bits, -largest_code, 2 * largest_code, 0.0, axis, False)
    if n - 1 <= largest_code and (bits == 1 or not zero_in_grid):
        return Levels(bits, 1 - n // 2, n - 1, 0.5, axis, False)
    return Levels(bits, -n // 2, n - 1, 0.0, axis, False)
