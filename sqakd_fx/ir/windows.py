"""The windows of adaptive pools."""

from __future__ import annotations

import torch
from torch import Tensor


def adaptive_windows(size: int, count: int) -> tuple[Tensor, Tensor]:
    """The places that each of `count` windows over `size` values reads, and which of them are its own.

    All rows have the length of the longest window: a shorter one repeats its last place.
    """
    number = torch.arange(count)
    starts = number * size // count
    ends = -(-(number + 1) * size // count)
    places = starts[:, None] + torch.arange(int((ends - starts).max()))
    return places.minimum(ends[:, None] - 1), places < ends[:, None]
