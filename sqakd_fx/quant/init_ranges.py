"""Where a quantizer's clipping range starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sqakd_fx.quant.levels import Levels
from sqakd_fx.quant.ranges import Range, min_max, percentile
from sqakd_fx.quant.sampling import spread_sample
from sqakd_fx.quant.weight_pairs import within_pairs

_CANDIDATES = 24
_SMALLEST_EXPONENT = -1.3
_MOST_SAMPLES_PER_CHANNEL = 8192
_NO_WIDTH = 2.0**-60
_BLOCK = 1 << 16
"""Values that are searched at once: they stay in a core's cache."""


def starting_range(
    x: Tensor,
    levels: Levels,
    own: Callable[[Tensor, Levels], Range],
    method: str,
    importance: Tensor | None = None,
) -> Range:
    """The clipping range of a tensor, per tensor or per channel of `levels`.

    `method`: "paper" uses `own`; "minmax", "percentile", "mse" and "output" replace it. "output" weighs each
    value's squared error by `importance`, of the shape of `x`.
    """
    if method == "paper":
        return own(x, levels)
    if method == "minmax":
        return _holding_pairs(min_max(x, levels), x.float(), levels)
    if method == "percentile":
        return percentile(x, levels)
    if method == "mse":
        return mse_optimal(x, levels)
    if method == "output":
        return mse_optimal(x, levels, importance)
    raise ValueError(f"unknown initialization {method!r}")


def widened(found: Range, least: Tensor) -> Range:
    """The range enlarged about zero to a width of at least `least`; one of no width goes up from zero."""
    width = found.upper - found.lower
    factor = (least / width.clamp_min(_NO_WIDTH)).clamp_min(1.0)
    upper = torch.where(width > _NO_WIDTH, factor * found.upper, least)
    return Range(factor * found.lower, upper)


def mse_optimal(x: Tensor, levels: Levels, importance: Tensor | None = None) -> Range:
    """The range [r min, s max] whose quantization error is least in the mean square, weighed by `importance`.

    r = s is one of 24 geometric candidates: every third is tried, then the best one's neighbours, on at most 8192
    values a channel (16 times as many per tensor), for many channels at once. Where the levels have ends `apart`,
    r is searched in the same way behind that, and then s.
    """
    rows = _rows(x, levels).contiguous()
    root = rows.new_ones(1, 1) if importance is None else _rows(importance, levels).sqrt()
    weights = root.expand(len(rows), -1)
    full = _holding_pairs(min_max(x, levels), x, levels)
    lower, upper = full.lower.reshape(-1, 1), full.upper.reshape(-1, 1)
    if not levels.per_sample:
        upper = torch.maximum(-lower, upper)
        lower = -upper
    block = max(1, _BLOCK // rows.shape[1])
    found = [
        _best_ends(values, roots, least, most, levels)
        for values, roots, least, most in zip(
            *(torch.split(one, block) for one in (rows, weights, lower, upper)), strict=True
        )
    ]
    low, high = (torch.cat(ends).reshape(full.upper.shape) for ends in zip(*found, strict=True))
    return Range(low, high)


def _rows(x: Tensor, levels: Levels) -> Tensor:
    """At most 8192 values of each channel, or 16 times as many of a tensor: (channels, values).

    Values that make a pair lie side by side. Where not all are taken, a pair is made of any two.
    """
    if levels.paired:
        x = x.movedim(1, -1)
    rows = x.reshape(1, -1) if levels.axis is None else x.transpose(0, levels.axis).flatten(1)
    return spread_sample(rows, _MOST_SAMPLES_PER_CHANNEL * (16 if levels.axis is None else 1))


def _holding_pairs(full: Range, x: Tensor, levels: Levels) -> Range:
    """The range of a weight in which no pair is made smaller, where its levels are paired."""
    if not levels.paired or x.shape[1] < 2:
        return full
    even = x.narrow(1, 0, x.shape[1] // 2 * 2)
    largest = levels.reduce((even[:, ::2] + even[:, 1::2]).abs(), torch.amax)
    return Range(torch.minimum(full.lower, -largest), torch.maximum(full.upper, largest))


def _best_ends(
    rows: Tensor, weights: Tensor, lower: Tensor, upper: Tensor, levels: Levels
) -> tuple[Tensor, Tensor]:
    """The best ends for each of (channels, values) within bounds of (channels, 1); of their shape."""

    def best(ends: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """The index that `ends` makes the best range of."""
        index = torch.zeros_like(upper)
        every_third = [index + k for k in range(0, _CANDIDATES, 3)]
        index = _least(rows, weights, ends, levels, every_third)
        around = [(index + k).clamp(0, _CANDIDATES - 1) for k in (0, -1, 1, -2, 2)]
        return _least(rows, weights, ends, levels, around)

    def both(index: Tensor) -> tuple[Tensor, Tensor]:
        return _ratio(index) * lower, _ratio(index) * upper

    low, high = both(best(both))
    if levels.apart and bool((lower < 0).any()) and bool((upper > 0).any()):
        low = _ratio(best(lambda index: (_ratio(index) * lower, high))) * lower
        high = _ratio(best(lambda index: (low, _ratio(index) * upper))) * upper
    return low, high


def _ratio(index: Tensor) -> Tensor:
    return 10 ** (index * (_SMALLEST_EXPONENT / (_CANDIDATES - 1)))


def _least(
    rows: Tensor,
    weights: Tensor,
    ends: Callable[[Tensor], tuple[Tensor, Tensor]],
    levels: Levels,
    indices: list[Tensor],
) -> Tensor:
    """For each channel, that of the candidates' indices whose weighed error is least; the earlier on a tie."""
    tiny = torch.finfo(torch.float32).tiny
    best, chosen = torch.full_like(indices[0], torch.inf), indices[0]
    exact, q = torch.empty_like(rows), torch.empty_like(rows)
    for index in indices:
        lower, upper = ends(index)
        if levels.per_sample:
            scale = ((upper - lower) / levels.span).clamp_min(tiny)
            lowest = torch.round(lower / scale)
        else:
            scale = (upper / levels.magnitude).clamp_min(tiny)
        torch.div(rows, scale, out=exact)
        if levels.half:
            exact.add_(levels.half)
        torch.round(exact, out=q)
        if levels.per_sample:
            torch.clamp(q, lowest, lowest + levels.span, out=q)
        else:
            q.clamp_(levels.lowest, levels.lowest + levels.span)
        if levels.paired:
            q = within_pairs(q)
        error = torch.linalg.vector_norm(q.sub_(exact).mul_(weights), dim=1, keepdim=True) * scale
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, index, chosen)
    return chosen
