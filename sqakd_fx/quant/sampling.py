"""A few values of many, without regard to how they lie.

A regular stride does not do: that of a batch of feature maps of 56 x 56 is a multiple of 56, and all that is seen are
the pixels at the left edge, which have padding beside them. Steps of the golden section of the whole (Weyl 1916) meet
every row, column and channel as often, and so does any beginning of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN_SECTION = (math.sqrt(5) - 1) / 2


def spread_places(count: int, most: int, device: torch.device) -> Tensor:
    """Indices of at most `most` of `count` values: int64 of shape (min(count, most),)."""
    if count <= most:
        return torch.arange(count, device=device)
    step = round(_GOLDEN_SECTION * count)
    while math.gcd(step, count) != 1:
        step += 1
    return torch.arange(most, device=device) * step % count


def spread_sample(rows: Tensor, most: int) -> Tensor:
    """`rows` (channels, values), or (channels, most), the same places of each, where there are more values."""
    count = rows.shape[1]
    if count <= most:
        return rows
    return rows.index_select(1, spread_places(count, most, rows.device))
