"""Clipping ranges, and those that the papers start from: from a tensor of any shape, float32, to a range.

Sources: LSQ (Esser 2020, section 2.1), LSQ+ (Bhalgat 2020), EWGS (Lee 2021), SAWB (Choi 2018b, eq. 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sqakd_fx.quant.levels import Levels


class Range(NamedTuple):
    """Where values are clipped; float32, of shape () per tensor or (channels,) per channel."""

    lower: Tensor
    upper: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The farther end's distance from zero."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def times(self, lower: float, upper: float) -> Range:
        """The range with its ends moved away from zero or towards it."""
        return Range(lower * self.lower, upper * self.upper)


SAWB_COEFFICIENTS: dict[int, tuple[float, float]] = {
    1: (0.0, -1.0),
    2: (3.12, 2.064),
    3: (7.509, 6.892),
    4: (12.68, 12.80),
    5: (17.74, 18.64),
    6: (22.20, 23.95),
    7: (26.80, 29.40),
    8: (31.76, 35.04),
}
"""Clip = c1 sqrt(E[w²]) - c2 E[|w|] (SAWB, eq. 6), by the bits that the levels make; 1 bit is E[|w|], the
least-squares answer; 6 and 7 bits, which the paper has not, are interpolated."""


def min_max(x: Tensor, levels: Levels) -> Range:
    """The whole tensor, with 0 inside."""
    zero = x.new_zeros(())
    return Range(
        torch.minimum(levels.reduce(x, torch.amin), zero),
        torch.maximum(levels.reduce(x, torch.amax), zero),
    )


def percentile(x: Tensor, levels: Levels, fraction: float = 0.9995) -> Range:
    """Quantiles (1 - fraction, fraction), with 0 inside."""

    def at(position: float) -> Callable[..., Tensor]:
        def pick(rows: Tensor, dim: int) -> Tensor:
            rank = max(1, min(rows.shape[1], math.ceil(position * rows.shape[1])))
            return torch.kthvalue(rows, rank, dim=dim).values

        return pick

    zero = x.new_zeros(())
    return Range(
        torch.minimum(levels.reduce(x, at(1 - fraction)), zero),
        torch.maximum(levels.reduce(x, at(fraction)), zero),
    )


def lsq_range(x: Tensor, levels: Levels) -> Range:
    """Step 2 mean|x| / sqrt(q_max)."""
    mean = levels.reduce(x.abs(), torch.mean)
    if levels.per_sample and bool(x.min() >= 0):
        upper = 2 * mean / math.sqrt(levels.span) * levels.span
        return Range(torch.zeros_like(upper), upper)
    q_max = max((levels.span + 1) // 2 - 1, 1)
    clip = 2 * mean / math.sqrt(q_max) * (levels.magnitude if not levels.per_sample else q_max)
    return Range(-clip, clip)


def three_sigma(x: Tensor, levels: Levels) -> Range:
    """EWGS weights: ∓3 std(w)."""
    clip = 3 * levels.reduce(x, _population_std)
    return Range(-clip, clip)


def lsq_plus_weight_range(x: Tensor, levels: Levels) -> Range:
    """LSQ+ weights: max(|mean - 3 std|, |mean + 3 std|)."""
    mean, deviation = levels.reduce(x, torch.mean), levels.reduce(x, _population_std)
    clip = Range(mean - 3 * deviation, mean + 3 * deviation).magnitude
    return Range(-clip, clip)


def half_normal(x: Tensor, levels: Levels) -> Range:
    """EWGS activations: min(x) and 3 std(x) / sqrt(1 - 2/π), the 3σ of a half-normal."""
    zero = x.new_zeros(())
    lower = torch.minimum(levels.reduce(x, torch.amin), zero)
    spread = 3 * levels.reduce(x, _population_std)
    upper = torch.where(lower < 0, spread, spread / math.sqrt(1 - 2 / math.pi))
    return Range(torch.maximum(lower, -upper), upper)


def _population_std(x: Tensor, dim: int) -> Tensor:
    return x.std(dim=dim, correction=0)


def sawb_clip(x: Tensor, levels: Levels) -> Tensor:
    """c1 sqrt(E[w²]) - c2 E[|w|], inside the largest |w|."""
    c1, c2 = SAWB_COEFFICIENTS[round(math.log2(levels.span + 1))]
    mean = levels.reduce(x.abs(), torch.mean)
    square = levels.reduce(x * x, torch.mean)
    clip = c1 * square.sqrt() - c2 * mean
    largest = levels.reduce(x.abs(), torch.amax)
    return torch.where(clip > 0, torch.minimum(clip, largest), largest)


def sawb_range(x: Tensor, levels: Levels) -> Range:
    """SAWB weights: ∓ the clip of their statistics."""
    clip = sawb_clip(x, levels)
    return Range(-clip, clip)
