"""Quantizer families: what each published method chooses inside the one unified quantizer.

A family is a value. It names its learned parameters and constants, says which interval of the real
line they span (`interval`), how a clipping range [l, u] becomes parameters (`from_range`), and which
range the paper starts from (`initial_range`, of `ranges.py`). The forward and the backward are in `quantizer.py`.

Sources: LSQ (Esser 2020, eq. 1-5), LSQ+ (Bhalgat 2020), PACT (Choi 2018, eq. 1-3), DoReFa (Zhou 2016,
eq. 9), EWGS (Lee 2021, eq. 1-6), SAWB (Choi 2018b, eq. 6), QIL (Jung 2019, eq. 3-6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sqakd_fx.quant.grid import along_axis
from sqakd_fx.quant.levels import Levels
from sqakd_fx.quant.ranges import (
    Range,
    half_normal,
    lsq_plus_weight_range,
    lsq_range,
    min_max,
    percentile,
    sawb_clip,
    sawb_range,
    three_sigma,
)

Parameters = Mapping[str, Tensor]


class Interval(NamedTuple):
    """v = f(x) / scale_in + offset;  x̂ = (q - half) * scale_out;  q >= lowest."""

    scale_in: Tensor
    offset: Tensor
    scale_out: Tensor
    lowest: Tensor


_FARTHEST = 2.0**24
"""Steps from zero beyond which a range is out of all bounds: it saturates, and never becomes NaN."""


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """`value` forwards, bit for bit; the gradient of `source` backwards."""
    return value.detach() + (source - source.detach())


def _scaled_gradient(
    parameter: Tensor, x: Tensor, levels: Levels, lowest: Tensor | None = None
) -> Tensor:
    """LSQ, section 2.2: the step's gradient times 1 / sqrt(N q_max).

    `lowest` is the smallest code where that is not `levels.lowest`.
    """
    elements = x.numel() // x.shape[0] if levels.per_sample and x.ndim > 1 else x.numel()
    if levels.axis is not None:
        elements //= x.shape[levels.axis]
    if lowest is not None:
        q_max = (lowest + levels.span).clamp_min(1)
        return straight_through(parameter, parameter * torch.rsqrt(max(elements, 1) * q_max))
    factor = 1.0 / math.sqrt(max(elements, 1) * max(levels.lowest + levels.span, 1))
    return straight_through(parameter, parameter * factor)


_ABOUT_ZERO = 1.125
"""How much coarser a step may be for codes about zero, which every runtime takes."""
_LEAST = 2.0**-60
"""Size of a range below which it counts as none: 1 / size² is still far from the end of float32."""


def _reach(lower: Tensor, upper: Tensor) -> Tensor:
    return Range(lower.detach(), upper.detach()).magnitude


def _not_below(value: Tensor, least: Tensor) -> Tensor:
    """A floor that lets the gradient through and keeps 1 / value² finite, also where a range is turned over."""
    return straight_through(torch.maximum(value, least).clamp_min(_LEAST), value)


def _constant(value: float, like: Tensor) -> Tensor:
    return torch.full((), float(value), dtype=torch.float32, device=like.device)


# -- intervals ---------------------------------------------------------------------------------


def symmetric(scale: Tensor, levels: Levels) -> Interval:
    """Whole (or, without a zero, half) multiples of `scale`, of shape () or (channels,)."""
    offset = _constant(levels.half, scale)
    return Interval(scale, offset, scale, _constant(levels.lowest, scale))


def affine(lower: Tensor, upper: Tensor, levels: Levels) -> Interval:
    """[lower, upper] moved so that 0 is a code: the grid that is exported is the one trained on."""
    scale = (upper - lower) / levels.span
    ratio = lower / _not_below(scale, _reach(lower, upper) / (2 * levels.span))
    ratio = torch.nan_to_num(ratio).clamp(-_FARTHEST, _FARTHEST)
    lowest = straight_through(torch.round(ratio).clamp(-levels.span, 0), ratio)
    return Interval(scale, _constant(0.0, scale), scale, lowest)


def about_zero(at: Interval, span: int) -> Interval:
    """The interval of `span` + 1 codes, half of them below zero, that holds `at`; one-sided values use half of it."""
    half = (span + 1) // 2
    wider = torch.maximum(-at.lowest / half, (at.lowest + span) / (half - 1))
    scale_in = at.scale_in * wider
    scale_out = scale_in if at.scale_out is at.scale_in else at.scale_out * wider
    return Interval(scale_in, at.offset, scale_out, _constant(-half, at.lowest))


def _unit(gain: Tensor, levels: Levels) -> Interval:
    """f(x) in [-1, 1], multiplied by a gain on the way out."""
    scale = _constant(1.0 / levels.magnitude, gain)
    return Interval(
        scale, _constant(levels.half, gain), gain / levels.magnitude, _constant(levels.lowest, gain)
    )


def _step_weight(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    return symmetric(_scaled_gradient(p["step"], x, levels), levels)


def _step_activation(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    step = _scaled_gradient(p["step"], x, levels, p["lowest"])
    return Interval(step, _constant(0.0, step), step, p["lowest"])


def _step_and_offset(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    step = _scaled_gradient(p["step"], x, levels)
    lower = _scaled_gradient(p["offset"], x, levels)
    return affine(lower, lower + step * levels.span, levels)


def _lower_upper(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    return affine(p["lower"], p["upper"], levels)


def _alpha(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    return affine(p["alpha"] * p["lower_over_alpha"], p["alpha"], levels)


def _center_distance(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    return affine(p["center"] - p["distance"], p["center"] + p["distance"], levels)


def _ewgs_weight(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    scale = (p["upper"] - p["lower"]) / levels.span
    floored = _not_below(scale, _reach(p["lower"], p["upper"]) / (1024 * levels.span))
    offset = levels.lowest - torch.nan_to_num(p["lower"] / floored).clamp(-_FARTHEST, _FARTHEST)
    return Interval(floored, offset, p["gain"] / levels.magnitude, _constant(levels.lowest, scale))


def _largest_magnitude(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    return symmetric(levels.reduce(x.detach().abs(), torch.amax) / levels.magnitude, levels)


def _sawb(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    return symmetric(sawb_clip(x.detach(), levels) / levels.magnitude, levels)


def _unit_gain(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    return _unit(p["gain"], levels)


# -- weight transforms f -----------------------------------------------------------------------


def _tanh(x: Tensor, p: Parameters, levels: Levels) -> Tensor:
    """tanh(w) / max |tanh(w)|, with tanh(max |w|) for the maximum.

    Compiled, a tanh that is computed again for the backward may round otherwise, and the gradient of a maximum
    that none of its arguments equals is 0 / 0.
    """
    largest = torch.tanh(levels.reduce(x.abs(), torch.amax))
    largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
    share = torch.tanh(x) / along_axis(largest, levels.axis, x.ndim)
    return straight_through(share.clamp(-1, 1), share)


def _qil(x: Tensor, p: Parameters, levels: Levels) -> Tensor:
    """No interval is empty, and none prunes every weight: half of the largest is always inside or above."""
    size = levels.reduce(x.detach().abs(), torch.amax)
    distance = _not_below(p["distance"], size / 1024)
    center = p["center"]
    center = straight_through(torch.minimum(center, distance + size / 2), center)
    center = along_axis(center, levels.axis, x.ndim)
    distance = along_axis(distance, levels.axis, x.ndim)
    gamma = p["gamma"]
    gamma = along_axis(straight_through(gamma.clamp(0.125, 8), gamma), levels.axis, x.ndim)
    inside = torch.nan_to_num((x.abs() - center + distance) / (2 * distance)).clamp(0, 1)
    powered = torch.where(inside > 0, inside.clamp_min(1e-12) ** gamma, inside)
    return torch.sign(x) * powered


# -- from a clipping range to parameters -------------------------------------------------------


def _to_step_weight(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"step": r.magnitude / levels.magnitude}


def _to_step_activation(r: Range, levels: Levels) -> dict[str, Tensor]:
    if bool((r.lower >= 0).all()):
        return {"step": r.upper / levels.span, "lowest": torch.zeros_like(r.upper)}
    half = (levels.span + 1) // 2
    about_zero = torch.maximum(-r.lower / half, r.upper / max(half - 1, 1))
    step = (r.upper - r.lower) / levels.span
    if levels.apart and bool(about_zero > _ABOUT_ZERO * step):
        lowest = torch.round(torch.nan_to_num(r.lower / step)).clamp(-levels.span, 0)
        return {"step": step, "lowest": lowest}
    return {"step": about_zero, "lowest": torch.full_like(r.upper, -float(half))}


def _to_step_and_offset(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"step": (r.upper - r.lower) / levels.span, "offset": r.lower}


def _to_lower_upper(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"lower": r.lower, "upper": r.upper}


def _to_alpha(r: Range, levels: Levels) -> dict[str, Tensor]:
    alpha = torch.where(r.upper > 0, r.upper, r.magnitude)
    return {"alpha": alpha, "lower_over_alpha": r.lower / alpha.clamp_min(1e-30)}


def _to_center_distance(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"center": (r.upper + r.lower) / 2, "distance": (r.upper - r.lower) / 2}


def _to_ewgs_weight(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"lower": r.lower, "upper": r.upper, "gain": r.magnitude}


def _to_qil_weight(r: Range, levels: Levels) -> dict[str, Tensor]:
    half = r.magnitude / 2
    return {"center": half, "distance": half, "gamma": torch.ones_like(half), "gain": 2 * half}


def _to_gain(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"gain": r.magnitude}


def _to_nothing(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Side:
    """What a family does for one role (weights or activations)."""

    interval: Callable[[Parameters, Tensor, Levels], Interval]
    from_range: Callable[[Range, Levels], dict[str, Tensor]]
    initial_range: Callable[[Tensor, Levels], Range]
    learned: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    transform: Callable[[Tensor, Parameters, Levels], Tensor] | None = None
    zero_in_grid: bool = True
    residual: bool = True
    delta: float = 0.0
    pairs: bool = False
    """Whether a step is chosen for weights of which neighbours are bound together (`weight_pairs.py`)."""
    share_of_rate: float = 1.0
    """Of a relative learning rate of ranges."""


@dataclass(frozen=True)
class Family:
    """A quantizer family: a name and what it does for weights and for activations."""

    name: str
    weight: Side
    activation: Side
    source: str = field(default="")


_MIN_MAX_WEIGHT = Side(_largest_magnitude, _to_nothing, min_max)
_TANH_WEIGHT = Side(
    _unit_gain, _to_gain, min_max, constants=("gain",), transform=_tanh, zero_in_grid=False
)
_PACT_ACTIVATION = Side(
    _alpha,
    _to_alpha,
    percentile,
    learned=("alpha",),
    constants=("lower_over_alpha",),
    residual=False,
    share_of_rate=0.1,  # what is clipped alone gives its gradient, which does not turn where the clip is right
)
_QIL_SHARE = 0.01  # the gain of weights on the way out does not follow their interval on the way in
_LSQ_WEIGHT = Side(_step_weight, _to_step_weight, lsq_range, learned=("step",), pairs=True)


def _fixed_activation(initial: Callable[[Tensor, Levels], Range]) -> Side:
    return Side(_lower_upper, _to_lower_upper, initial, constants=("lower", "upper"))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("minmax", _MIN_MAX_WEIGHT, _fixed_activation(min_max), "Jacob 2018"),
        Family(
            "percentile",
            Side(_step_weight, _to_step_weight, percentile, constants=("step",), pairs=True),
            _fixed_activation(percentile),
            "Wu 2020",
        ),
        Family("dorefa", _TANH_WEIGHT, _fixed_activation(percentile), "Zhou 2016, eq. 9"),
        Family("pact", _TANH_WEIGHT, _PACT_ACTIVATION, "Choi 2018, eq. 1-3"),
        Family(
            "lsq",
            _LSQ_WEIGHT,
            Side(
                _step_activation,
                _to_step_activation,
                lsq_range,
                learned=("step",),
                constants=("lowest",),
            ),
            "Esser 2020, eq. 1-5",
        ),
        Family(
            "lsq+",
            Side(
                _step_weight,
                _to_step_weight,
                lsq_plus_weight_range,
                learned=("step",),
                pairs=True,
            ),
            Side(_step_and_offset, _to_step_and_offset, percentile, learned=("step", "offset")),
            "Bhalgat 2020, eq. 3-8",
        ),
        Family(
            "ewgs",
            Side(
                _ewgs_weight,
                _to_ewgs_weight,
                three_sigma,
                learned=("lower", "upper", "gain"),
                zero_in_grid=False,
                delta=1e-3,
            ),
            Side(
                _lower_upper,
                _to_lower_upper,
                half_normal,
                learned=("lower", "upper"),
                delta=1e-3,
            ),
            "Lee 2021, eq. 1-6",
        ),
        Family(
            "sawb",
            Side(_sawb, _to_nothing, sawb_range),
            _PACT_ACTIVATION,
            "Choi 2018b, eq. 6",
        ),
        Family(
            "qil",
            Side(
                _unit_gain,
                _to_qil_weight,
                min_max,
                learned=("center", "distance", "gamma"),
                constants=("gain",),
                transform=_qil,
                share_of_rate=_QIL_SHARE,
            ),
            Side(
                _center_distance,
                _to_center_distance,
                percentile,
                learned=("center", "distance"),
                share_of_rate=_QIL_SHARE,
            ),
            "Jung 2019, eq. 3-6",
        ),
    )
}


def register(family: Family) -> None:
    """Make a family known by its name, to recipes as well; an earlier one of that name is replaced."""
    FAMILIES[family.name] = family
