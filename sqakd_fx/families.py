"""Quantizer families: what each published method chooses inside the one unified quantizer.

A family is a value. It names its learned parameters and constants, says which interval of the real
line they span (`interval`), how a clipping range [l, u] becomes parameters (`from_range`), and which
range the paper starts from (`initial_range`). The forward and the backward are in `quantizer.py`.

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

from sqakd_fx.grid import along_axis

Parameters = Mapping[str, Tensor]


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


class Interval(NamedTuple):
    """v = f(x) / scale_in + offset;  x̂ = (q - half) * scale_out;  q >= lowest."""

    scale_in: Tensor
    offset: Tensor
    scale_out: Tensor
    lowest: Tensor


class Range(NamedTuple):
    lower: Tensor
    upper: Tensor


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


_LEAST = 2.0**-60
"""Size of a range below which it counts as none: 1 / size² is still far from the end of float32."""


def _reach(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.maximum(lower.detach().abs(), upper.detach().abs())


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
    return symmetric(_sawb_clip(x.detach(), levels) / levels.magnitude, levels)


def _unit_gain(p: Parameters, x: Tensor, levels: Levels) -> Interval:
    return _unit(p["gain"], levels)


# -- weight transforms f -----------------------------------------------------------------------


def _tanh(x: Tensor, p: Parameters, levels: Levels) -> Tensor:
    squashed = torch.tanh(x)
    largest = levels.reduce(squashed.abs(), torch.amax).clamp_min(torch.finfo(torch.float32).tiny)
    return squashed / along_axis(largest, levels.axis, x.ndim)


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


def _magnitude(r: Range) -> Tensor:
    return torch.maximum(r.lower.abs(), r.upper.abs())


def _to_step_weight(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"step": _magnitude(r) / levels.magnitude}


def _to_step_activation(r: Range, levels: Levels) -> dict[str, Tensor]:
    if bool((r.lower >= 0).all()):
        return {"step": r.upper / levels.span, "lowest": torch.zeros_like(r.upper)}
    half = (levels.span + 1) // 2
    lowest = torch.full_like(r.upper, -float(half))
    return {"step": torch.maximum(-r.lower / half, r.upper / max(half - 1, 1)), "lowest": lowest}


def _to_step_and_offset(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"step": (r.upper - r.lower) / levels.span, "offset": r.lower}


def _to_lower_upper(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"lower": r.lower, "upper": r.upper}


def _to_alpha(r: Range, levels: Levels) -> dict[str, Tensor]:
    alpha = torch.where(r.upper > 0, r.upper, _magnitude(r))
    return {"alpha": alpha, "lower_over_alpha": r.lower / alpha.clamp_min(1e-30)}


def _to_center_distance(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"center": (r.upper + r.lower) / 2, "distance": (r.upper - r.lower) / 2}


def _to_ewgs_weight(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"lower": r.lower, "upper": r.upper, "gain": _magnitude(r)}


def _to_qil_weight(r: Range, levels: Levels) -> dict[str, Tensor]:
    half = _magnitude(r) / 2
    return {"center": half, "distance": half, "gamma": torch.ones_like(half), "gain": 2 * half}


def _to_gain(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {"gain": _magnitude(r)}


def _to_nothing(r: Range, levels: Levels) -> dict[str, Tensor]:
    return {}


# -- the papers' own starting ranges -----------------------------------------------------------


def min_max(x: Tensor, levels: Levels) -> Range:
    """The whole tensor, with 0 inside."""
    zero = _constant(0.0, x)
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

    zero = _constant(0.0, x)
    return Range(
        torch.minimum(levels.reduce(x, at(1 - fraction)), zero),
        torch.maximum(levels.reduce(x, at(fraction)), zero),
    )


def _lsq_range(x: Tensor, levels: Levels) -> Range:
    """Step 2 mean|x| / sqrt(q_max)."""
    mean = levels.reduce(x.abs(), torch.mean)
    if levels.per_sample and bool(x.min() >= 0):
        upper = 2 * mean / math.sqrt(levels.span) * levels.span
        return Range(torch.zeros_like(upper), upper)
    q_max = max((levels.span + 1) // 2 - 1, 1)
    clip = 2 * mean / math.sqrt(q_max) * (levels.magnitude if not levels.per_sample else q_max)
    return Range(-clip, clip)


def _three_sigma(x: Tensor, levels: Levels) -> Range:
    """EWGS weights: ∓3 std(w)."""
    clip = 3 * levels.reduce(x, _population_std)
    return Range(-clip, clip)


def _lsq_plus_weight_range(x: Tensor, levels: Levels) -> Range:
    """LSQ+ weights: max(|mean - 3 std|, |mean + 3 std|)."""
    mean, deviation = levels.reduce(x, torch.mean), levels.reduce(x, _population_std)
    clip = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    return Range(-clip, clip)


def _half_normal(x: Tensor, levels: Levels) -> Range:
    """EWGS activations: min(x) and 3 std(x) / sqrt(1 - 2/π), the 3σ of a half-normal."""
    zero = _constant(0.0, x)
    lower = torch.minimum(levels.reduce(x, torch.amin), zero)
    spread = 3 * levels.reduce(x, _population_std)
    upper = torch.where(lower < 0, spread, spread / math.sqrt(1 - 2 / math.pi))
    return Range(torch.maximum(lower, -upper), upper)


def _population_std(x: Tensor, dim: int) -> Tensor:
    return x.std(dim=dim, correction=0)


def _sawb_clip(x: Tensor, levels: Levels) -> Tensor:
    c1, c2 = SAWB_COEFFICIENTS[levels.bits]
    mean = levels.reduce(x.abs(), torch.mean)
    square = levels.reduce(x * x, torch.mean)
    clip = c1 * square.sqrt() - c2 * mean
    largest = levels.reduce(x.abs(), torch.amax)
    return torch.where(clip > 0, torch.minimum(clip, largest), largest)


def _sawb_range(x: Tensor, levels: Levels) -> Range:
    clip = _sawb_clip(x, levels)
    return Range(-clip, clip)


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
"""Clip = c1 sqrt(E[w²]) - c2 E[|w|] (SAWB, eq. 6); 1 bit is E[|w|], the least-squares answer; 6 and 7
bits, which the paper has not, are interpolated."""


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
_LSQ_WEIGHT = Side(_step_weight, _to_step_weight, _lsq_range, learned=("step",))


def _fixed_activation(initial: Callable[[Tensor, Levels], Range]) -> Side:
    return Side(_lower_upper, _to_lower_upper, initial, constants=("lower", "upper"))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("minmax", _MIN_MAX_WEIGHT, _fixed_activation(min_max), "Jacob 2018"),
        Family(
            "percentile",
            Side(_step_weight, _to_step_weight, percentile, constants=("step",)),
            _fixed_activation(percentile),
            "Wu 2020",
        ),
        Family("dorefa", _TANH_WEIGHT, _fixed_activation(percentile), "Zhou 2016, eq. 9"),
        Family(
            "pact",
            _TANH_WEIGHT,
            Side(
                _alpha,
                _to_alpha,
                percentile,
                learned=("alpha",),
                constants=("lower_over_alpha",),
                residual=False,
            ),
            "Choi 2018, eq. 1-3",
        ),
        Family(
            "lsq",
            _LSQ_WEIGHT,
            Side(
                _step_activation,
                _to_step_activation,
                _lsq_range,
                learned=("step",),
                constants=("lowest",),
            ),
            "Esser 2020, eq. 1-5",
        ),
        Family(
            "lsq+",
            Side(_step_weight, _to_step_weight, _lsq_plus_weight_range, learned=("step",)),
            Side(_step_and_offset, _to_step_and_offset, percentile, learned=("step", "offset")),
            "Bhalgat 2020, eq. 3-8",
        ),
        Family(
            "ewgs",
            Side(
                _ewgs_weight,
                _to_ewgs_weight,
                _three_sigma,
                learned=("lower", "upper", "gain"),
                zero_in_grid=False,
                delta=1e-3,
            ),
            Side(
                _lower_upper,
                _to_lower_upper,
                _half_normal,
                learned=("lower", "upper"),
                delta=1e-3,
            ),
            "Lee 2021, eq. 1-6",
        ),
        Family(
            "sawb",
            Side(_sawb, _to_nothing, _sawb_range),
            Side(
                _alpha,
                _to_alpha,
                percentile,
                learned=("alpha",),
                constants=("lower_over_alpha",),
                residual=False,
            ),
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
            ),
            Side(
                _center_distance,
                _to_center_distance,
                percentile,
                learned=("center", "distance"),
            ),
            "Jung 2019, eq. 3-6",
        ),
    )
}


def register(family: Family) -> None:
    """Make a family known by its name, to recipes as well; an earlier one of that name is replaced."""
    FAMILIES[family.name] = family
