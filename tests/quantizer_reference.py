"""The papers' quantizers in float64 numpy, written from their formulas and from nothing else here.

Everything is elementwise or a sum over `axes`. With x_c the clipped and x_q the discretized value, both
normalized to [0, 1], and g the gradient of the output, the one backward (SQAKD, section 3; EWGS, eq. 6) is

    g_c = g_q + δ |g_q| (x_c - x_q) + μ (x_c - x_q)        inside the interval, 0 outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Values = Mapping[str, Array]


_EDGE = 1e-6
"""A value that float32 cannot tell from the end of the interval lies inside."""


@dataclass(frozen=True)
class Setting:
    """Bits, grid, and how the backward is modulated.

    `axes` are those that a parameter is shared over; `features` is LSQ's N.
    """

    bits: int
    zero: bool
    axes: tuple[int, ...]
    features: int
    delta: float = 0.0
    mu: float = 0.0
    largest_code: int = 127

    def total(self, x: Array) -> Array:
        return np.sum(x, axis=self.axes, keepdims=True)

    def largest(self, x: Array) -> Array:
        return np.max(np.abs(x), axis=self.axes, keepdims=True)

    def mean(self, x: Array) -> Array:
        return np.mean(x, axis=self.axes, keepdims=True)

    def weight_codes(self) -> tuple[float, float]:
        """Smallest and largest value in steps: -8 .. 7, or -7.5 .. 7.5 without a zero, at 4 bits."""
        if self.bits == 8:
            return float(-self.largest_code), float(self.largest_code)
        half = 2.0 ** (self.bits - 1)
        odd = 2 * half - 1 <= self.largest_code and (self.bits == 1 or not self.zero)
        return (0.5 - half, half - 0.5) if odd else (-half, half - 1)

    @property
    def levels(self) -> int:
        return 2 * self.largest_code + 1 if self.bits == 8 else int(2**self.bits)


@dataclass(frozen=True)
class Reference:
    """What a quantizer gives, the gradients of `sum(g * output)`, and how far rounding was from a tie."""

    output: Array
    gradients: Mapping[str, Array]
    distance_to_tie: Array
    distance_to_edge: Array


@dataclass(frozen=True)
class _Node:
    """f in [l, u] rounded to n levels and mapped to [low, high], and its gradients per element."""

    output: Array
    f: Array
    l: Array  # noqa: E741
    u: Array
    low: Array
    high: Array
    tie: Array
    edge: Array


def _node(
    f: Array,
    l: Any,  # noqa: E741
    u: Any,
    low: Any,
    high: Any,
    n: int,
    g: Array,
    s: Setting,
) -> _Node:
    t = (f - l) / (u - l)
    c = np.clip(t, 0, 1)
    q = np.rint((n - 1) * c) / (n - 1)
    inside = (t >= -_EDGE) & (t <= 1 + _EDGE)
    g_q = g * (high - low)
    g_c = np.where(inside, g_q + s.delta * np.abs(g_q) * (c - q) + s.mu * (c - q), 0)
    away = np.abs((n - 1) * t % 1 - 0.5)
    return _Node(
        low + q * (high - low),
        g_c / (u - l),
        -g_c * (1 - c) / (u - l),
        -g_c * c / (u - l),
        g * (1 - q),
        g * q,
        np.where(inside, away, 1.0),
        (n - 1) * np.minimum(np.abs(t), np.abs(t - 1)),
    )


def _scaled_step(x: Array, step: Array, low: float, high: float, g: Array, s: Setting) -> Reference:
    """LSQ, eq. 1-3 and section 2.2: ∂x̂/∂s = round(x/s) - x/s inside, Q_N and Q_P outside."""
    n = int(high - low) + 1
    at = _node(x, low * step, high * step, low * step, high * step, n, g, s)
    of_step = low * (at.l + at.low) + high * (at.u + at.high)
    shrunk = s.total(of_step) / np.sqrt(s.features * max(np.floor(high + 0.5), 1))
    return Reference(at.output, {"x": at.f, "step": shrunk}, at.tie, at.edge)


def lsq_weight(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    return _scaled_step(x, p["step"], *s.weight_codes(), g, s)


def lsq_activation(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    low = float(p["lowest"].reshape(()))
    return _scaled_step(x, p["step"], low, low + 2**s.bits - 1, g, s)


def fixed_step_weight(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    found = lsq_weight(x, p, g, s)
    return Reference(
        found.output, {"x": found.gradients["x"]}, found.distance_to_tie, found.distance_to_edge
    )


def min_max_weight(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    """Jacob 2018, symmetric: the largest magnitude is the last level."""
    return fixed_step_weight(x, {"step": s.largest(x) / s.weight_codes()[1]}, g, s)


_SAWB = {
    1: (0.0, -1.0), 2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80),
    5: (17.74, 18.64), 6: (22.20, 23.95), 7: (26.80, 29.40), 8: (31.76, 35.04),
}  # fmt: skip


def sawb_weight(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    """Choi 2018b, eq. 6: α = c1 sqrt(E[w²]) - c2 E[|w|], never beyond the largest weight."""
    c1, c2 = _SAWB[7 if s.levels == 129 else s.bits]
    alpha = c1 * np.sqrt(s.mean(x * x)) - c2 * s.mean(np.abs(x))
    alpha = np.where(alpha > 0, np.minimum(alpha, s.largest(x)), s.largest(x))
    return fixed_step_weight(x, {"step": alpha / s.weight_codes()[1]}, g, s)


def tanh_transform(x: Array, s: Setting) -> Array:
    """DoReFa, eq. 9: tanh(w) / max |tanh(w)|."""
    return np.tanh(x) / s.largest(np.tanh(x))


def dorefa_weight(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    """DoReFa, eq. 9, straight through the rounding and by the chain rule through tanh and max."""
    y, gain = np.tanh(x), p["gain"]
    m = s.largest(y)
    at = _node(y / m, -1.0, 1.0, -gain, gain, s.levels, g, s)
    through_max = np.where(np.abs(y) == m, np.sign(y) * s.total(at.f * y) / m**2, 0)
    return Reference(at.output, {"x": (1 - y * y) * (at.f / m - through_max)}, at.tie, at.edge)


def ewgs_weight(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    """EWGS, eq. 1-6: [l, u] to [0, 1], rounded, to [-1, 1], times a learned scale."""
    gain = p["gain"]
    at = _node(x, p["lower"], p["upper"], -gain, gain, s.levels, g, s)
    gradients = {
        "x": at.f,
        "lower": s.total(at.l),
        "upper": s.total(at.u),
        "gain": s.total(at.high - at.low),
    }
    return Reference(at.output, gradients, at.tie, at.edge)


def qil_transform(x: Array, p: Values) -> Array:
    """QIL, eq. 3: sign(w) times ((|w| - c) / 2d + 1/2)^γ, 0 below the interval and 1 above."""
    t = np.clip((np.abs(x) - p["center"]) / (2 * p["distance"]) + 0.5, 0, 1)
    return np.sign(x) * t ** p["gamma"]


def qil_weight(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    """QIL, eq. 3-6: the transformed weight on a grid over [-1, 1] with a zero."""
    low, high = s.weight_codes()
    gain, c, d, gamma = p["gain"], p["center"], p["distance"], p["gamma"]
    f = qil_transform(x, p)
    n = int(high - low) + 1
    at = _node(f, low / high, 1.0, gain * low / high, gain, n, g, s)
    t = (np.abs(x) - c) / (2 * d) + 0.5
    within = (t > 0) & (t < 1)
    safe = np.where(within, t, 0.5)
    slope = np.where(within, at.f * gamma * safe ** (gamma - 1), 0)
    gradients = {
        "x": slope / (2 * d),
        "center": s.total(-slope * np.sign(x) / (2 * d)),
        "distance": s.total(-slope * np.sign(x) * (np.abs(x) - c) / (2 * d * d)),
        "gamma": s.total(np.where(within, at.f * np.sign(x) * safe**gamma * np.log(safe), 0)),
    }
    edge = (n - 1) * np.minimum(np.abs(t), np.abs(t - 1))
    return Reference(at.output, gradients, at.tie, np.minimum(edge, at.edge))


@dataclass(frozen=True)
class _OnZero:
    reference: Reference
    of_lower: Array
    of_upper: Array
    of_step: Array
    of_position: Array


def _interval_with_zero(
    x: Array, lower: Array, upper: Array, g: Array, s: Setting, *, round_is_identity: bool = False
) -> _OnZero:
    """[l, u] with its zero point rounded: x̂ = s · clip(round(x/s), z, z + n - 1), s = (u - l)/(n - 1).

    Straight through both roundings, as LSQ has it: inside ∂x̂/∂s = round(x/s) - x/s; outside
    x̂ = s z or s (z + n - 1) with z = round(l/s), so ∂x̂/∂l = 1 at fixed s and ∂x̂/∂s = z - l/s,
    and n - 1 more above. `round_is_identity` takes x/s for round(x/s) there as well (PACT).
    """
    steps = 2**s.bits - 1
    step = (upper - lower) / steps
    z = np.rint(lower / step)
    at = _node(x, z * step, (z + steps) * step, z * step, (z + steps) * step, steps + 1, g, s)
    below, above = x < z * step, x > (z + steps) * step
    inside = ~below & ~above
    seen = x / step if round_is_identity else at.output / step
    of_step = np.where(inside, g * seen - at.f * x / step, g * (z - lower / step + above * steps))
    position = np.where(inside, 0, g)
    tie = np.minimum(at.tie, np.abs(lower / step % 1 - 0.5))
    return _OnZero(
        Reference(at.output, {"x": at.f}, tie, at.edge),
        s.total(position - of_step / steps),
        s.total(of_step / steps),
        s.total(of_step),
        s.total(position),
    )


def _with(found: _OnZero, **gradients: Array) -> Reference:
    r = found.reference
    return Reference(r.output, {**r.gradients, **gradients}, r.distance_to_tie, r.distance_to_edge)


def fixed_activation(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    return _interval_with_zero(x, p["lower"], p["upper"], g, s).reference


def ewgs_activation(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    found = _interval_with_zero(x, p["lower"], p["upper"], g, s)
    return _with(found, lower=found.of_lower, upper=found.of_upper)


def qil_activation(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    c, d = p["center"], p["distance"]
    found = _interval_with_zero(x, c - d, c + d, g, s)
    return _with(
        found, center=found.of_lower + found.of_upper, distance=found.of_upper - found.of_lower
    )


def lsq_plus_activation(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    """LSQ+, eq. 3-8, with the gradients of s and β shrunk as LSQ shrinks them."""
    steps = 2**s.bits - 1
    found = _interval_with_zero(x, p["offset"], p["offset"] + steps * p["step"], g, s)
    shrink = 1 / np.sqrt(s.features * steps)
    return _with(found, step=found.of_step * shrink, offset=found.of_position * shrink)


def pact_activation(x: Array, p: Values, g: Array, s: Setting) -> Reference:
    """PACT, eq. 1-3: ∂x̂/∂α = 1 above α and 0 below; a signed input is clipped to [ρα, α], ρ fixed.

    At a fixed ρ the zero point does not move with α: both clips are multiples of it.
    """
    alpha, rho = p["alpha"], p["lower_over_alpha"]
    found = _interval_with_zero(x, rho * alpha, alpha, g, s, round_is_identity=True)
    steps = 2**s.bits - 1
    z = np.rint(rho * steps / (1 - rho))
    low, high = z * (1 - rho) / steps, (z + steps) * (1 - rho) / steps
    moved = np.where(x < low * alpha, g * low, np.where(x > high * alpha, g * high, 0))
    within = (x >= low * alpha) & (x <= high * alpha)
    moved = moved + np.where(within, (g - found.reference.gradients["x"]) * x / alpha, 0)
    return _with(found, alpha=s.total(moved))


Rule = Callable[[Array, Values, Array, Setting], Reference]

WEIGHTS: dict[str, Rule] = {
    "minmax": min_max_weight,
    "percentile": fixed_step_weight,
    "dorefa": dorefa_weight,
    "pact": dorefa_weight,
    "lsq": lsq_weight,
    "lsq+": lsq_weight,
    "ewgs": ewgs_weight,
    "sawb": sawb_weight,
    "qil": qil_weight,
}
ACTIVATIONS: dict[str, Rule] = {
    "minmax": fixed_activation,
    "percentile": fixed_activation,
    "dorefa": fixed_activation,
    "pact": pact_activation,
    "lsq": lsq_activation,
    "lsq+": lsq_plus_activation,
    "ewgs": ewgs_activation,
    "sawb": pact_activation,
    "qil": qil_activation,
}
NO_ZERO = ("dorefa", "pact", "ewgs")
"""Families whose weight levels stand symmetrically about zero."""
