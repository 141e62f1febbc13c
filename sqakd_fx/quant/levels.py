"""How many levels a quantizer has, and along which axis it has a range for each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """The discrete side of a quantizer.

    q runs over `span + 1` consecutive integers from `lowest` (for an activation `lowest` is minus the
    zero point and may move). `half` is 0.5 where the grid has no zero: values are (q - half) * scale.
    """

    bits: int
    lowest: int
    span: int
    half: float
    axis: int | None
    per_sample: bool

    @property
    def magnitude(self) -> float:
        """Largest |value| / scale that both signs reach."""
        return self.lowest + self.span - self.half

    def reduce(self, x: Tensor, how: Callable[..., Tensor]) -> Tensor:
        """Apply a reduction per tensor (result of shape ()) or per channel (shape (channels,))."""
        if self.axis is None:
            return how(x.reshape(1, -1), dim=1).reshape(())
        return how(x.transpose(0, self.axis).reshape(x.shape[self.axis], -1), dim=1)
