"""Weights whose neighbours of one sign are small enough for kernels that add two products in 16 bits.

For neighbours a and b along axis 1, in steps of the grid and of one sign, with p = `LARGEST_PAIR`:

    e = max(0, |a| + |b| - p),    a' = a - sign(a) e / 2,    b' = b - sign(b) e / 2

which is the nearest point with |a'| + |b'| <= p. The last of an odd number has no neighbour. Of opposite signs |a + b|
is no larger than |a| or |b|, so that |a + b| <= p asks for the same, where both lie within ±p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqakd_fx.quant.levels import LARGEST_PAIR


def within_pairs(steps: Tensor) -> Tensor:
    """Weights in steps of the grid, within ±127, moved so that no pair overflows.

    `steps` is floating-point of shape (rows, columns, ...); so is the result.
    """
    pairs = _pairs(steps)
    together = _sums(pairs)
    return _with_the_last(
        pairs - (together - together.clamp(-LARGEST_PAIR, LARGEST_PAIR)) / 2, steps
    )


def gradient_of_pairs(gradient: Tensor, steps: Tensor) -> Tensor:
    """The gradient of `steps`, from that of `within_pairs(steps)`: the part along a bound sum is lost."""
    pairs = _pairs(gradient)
    bound = _sums(_pairs(steps)).abs() > LARGEST_PAIR
    return _with_the_last(pairs - torch.where(bound, _sums(pairs) / 2, 0.0), gradient)


def _pairs(x: Tensor) -> Tensor:
    """(rows, columns, ...) as (rows, pairs, 2, ...)."""
    rows, columns, *places = x.shape
    return x.narrow(1, 0, columns // 2 * 2).reshape(rows, columns // 2, 2, *places)


def _sums(pairs: Tensor) -> Tensor:
    return pairs.narrow(2, 0, 1) + pairs.narrow(2, 1, 1)


def _with_the_last(pairs: Tensor, x: Tensor) -> Tensor:
    within = pairs.flatten(1, 2)
    return within if x.shape[1] % 2 == 0 else torch.cat((within, x[:, -1:]), 1)
