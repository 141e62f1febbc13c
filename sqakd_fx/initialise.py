"""Where a quantizer's clipping range starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sqakd_fx.families import Levels, Range, min_max, percentile

_CANDIDATES = 24
_MOST_SAMPLES_PER_CHANNEL = 4096


def starting_range(
    x: Tensor, levels: Levels, own: Callable[[Tensor, Levels], Range], method: str
) -> Range:
    """The clipping range of a tensor, per tensor or per channel of `levels`.

    `method`: "paper" uses `own`; "minmax", "percentile" and "mse" replace it.
    """
    if method == "paper":
        return own(x, levels)
    if method == "minmax":
        return min_max(x, levels)
    if method == "percentile":
        return percentile(x, levels)
    if method == "mse":
        return mse_optimal(x, levels)
    raise ValueError(f"unknown initialisation {method!r}")


def mse_optimal(x: Tensor, levels: Levels) -> Range:
    """The range r * [min, max] whose quantization error is least in the mean square.

    r is searched over 24 geometric candidates, for all channels at once, on at most 4096 values a
    channel (16 times as many per tensor).
    """
    rows = x.reshape(1, -1) if levels.axis is None else x.transpose(0, levels.axis).flatten(1)
    most = _MOST_SAMPLES_PER_CHANNEL * (16 if levels.axis is None else 1)
    stride = -(-rows.shape[1] // most)
    rows = rows[:, ::stride].contiguous()
    full = min_max(x, levels)
    lower, upper = full.lower.reshape(-1, 1), full.upper.reshape(-1, 1)
    if not levels.per_sample:
        upper = torch.maximum(-lower, upper)
        lower = -upper
    tiny = torch.finfo(torch.float32).tiny
    best = torch.full((rows.shape[0],), torch.inf, device=x.device)
    chosen = torch.ones(rows.shape[0], device=x.device)
    for ratio in torch.logspace(0, -1.3, _CANDIDATES).tolist():
        if levels.per_sample:
            scale = (ratio * (upper - lower) / levels.span).clamp_min(tiny)
            lowest = torch.round(ratio * lower / scale)
        else:
            scale = (ratio * upper / levels.magnitude).clamp_min(tiny)
            lowest = torch.full_like(scale, float(levels.lowest))
        q = torch.div(rows, scale).add_(levels.half).round_()
        q = torch.minimum(torch.maximum(q, lowest), lowest + levels.span)
        error = q.sub_(levels.half).mul_(scale).sub_(rows).square_().mean(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, ratio, chosen)
    shape = full.upper.shape
    return Range((chosen * lower[:, 0]).reshape(shape), (chosen * upper[:, 0]).reshape(shape))
