"""The unified quantizer: one forward and one backward for every published quantizer.

    v  = f(x) / s_in + o               normalize     f: a weight transform or the identity
    q  = clamp(round(v), lo, lo + n-1) discretize    round half to even, n levels
    x̂  = (q - h) * s_out               denormalize   h = 1/2 for a grid without zero, else 0

    g_v = g_q (1 + δ sign(g_q) e) + μ e / (n-1),     e = (clamp(v) - q) / (n-1),  g_q = g_x̂ s_out

With c = (v - lo) / (n-1) this is SQAKD's form (section 3): g_c = g_q + μ (c - q/(n-1)). δ > 0 is
EWGS, where μ = δ |g_q|; δ = μ = 0 is the straight-through estimator. Outside the interval nothing
flows to x. Neighbouring weights that are bound together (`weight_pairs.py`) are moved behind the clamp, before they
are rounded. What flows to s_in, o, s_out and lo follows from the forward; with `residual` the
gradient of s_out sees the rounded q (LSQ, eq. 3), without it round counts as the identity there
too, which gives PACT's gradient: 1 above the clip, 0 inside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sqakd_fx.errors import NotFiniteError
from sqakd_fx.quant.families import (
    FAMILIES,
    Family,
    Interval,
    Side,
    about_zero,
    straight_through,
)
from sqakd_fx.quant.grid import Grid, along_axis
from sqakd_fx.quant.levels import LARGEST_CODE, Levels, weight_levels
from sqakd_fx.quant.ranges import Range
from sqakd_fx.quant.weight_pairs import gradient_of_pairs, within_pairs

_ENDS_APART = 3
"""Bits of an activation from which the two ends of its range are chosen apart."""
_SMALLEST_SCALE = 2.0**-60
_LARGEST_SCALE = 2.0**100
_ROUNDING = 2.0**-22
"""Of the interval: what x / (max|x| / n) may exceed n by, so that the largest value lies inside."""


def on_grid(
    x: Tensor, s_in: Tensor, offset: Tensor, s_out: Tensor, lo: Tensor, span: int, half: float
) -> Tensor:
    """x̂ of the equations at the top of this file; all tensors broadcast against `x`, which is f(x) there."""
    return (torch.round(x / s_in + offset).clamp(lo, lo + span) - half) * s_out


class UnifiedQuantize(torch.autograd.Function):
    """Fake quantization by the equations at the top of this file.

    `x` has any shape; `s_in`, `offset` and `s_out` broadcast against it; `lo` is a scalar. Float32.
    `s_out` is None where it is `s_in`: torch.compile takes no tensor twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s_in: Tensor,
        offset: Tensor,
        s_out: Tensor | None,
        lo: Tensor,
        delta: Tensor,
        mu: Tensor,
        span: int,
        half: float,
        residual: bool,
        modulated: bool,
        paired: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, s_in, offset, s_out, lo, delta, mu)
        ctx.constants = (span, half, residual, modulated, paired)
        scale = s_in if s_out is None else s_out
        if paired:
            v = within_pairs((x / s_in + offset).clamp(lo, lo + span))
            return (torch.round(v) - half) * scale
        return on_grid(x, s_in, offset, scale, lo, span, half)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, s_in, offset, s_out, lo, delta, mu = ctx.saved_tensors
        span, half, residual, modulated, paired = ctx.constants
        needs = ctx.needs_input_grad
        g = gradients[0]
        v = x / s_in + offset
        clamped = v.clamp(lo, lo + span)
        inside = (v - clamped).abs() <= span * _ROUNDING
        clipped = within_pairs(clamped) if paired else clamped
        q = torch.round(clipped)
        seen = (q if residual else clipped) - half
        slope = g  # s_out/s_in g_q: the gradient of x where the straight-through estimator holds
        if modulated:
            g_q = g * (s_in if s_out is None else s_out)
            error = (clipped - q) / span
            g_v = g_q * (1 + delta * torch.sign(g_q) * error) + mu * error / span
            slope = g_v / s_in
        elif s_out is not None:
            slope = g * (s_out / s_in)
        if paired:
            slope = gradient_of_pairs(slope, clamped)
        slope = torch.where(inside, slope, 0.0)
        g_x = slope if needs[0] else None
        g_offset = _summed(slope * s_in, offset) if needs[2] else None
        g_in = g_out = g_lo = None
        if needs[1]:
            own = g * seen if s_out is None else 0.0
            g_in = _summed(own - slope * (v - offset), s_in)
        if s_out is not None and needs[3]:
            g_out = _summed(g * seen, s_out)
        if needs[4]:
            outer = torch.where(inside, 0.0, g * (s_in if s_out is None else s_out))
            g_lo = _summed(outer, lo)
        return g_x, g_in, g_offset, g_out, g_lo, None, None, None, None, None, None, None


def _summed(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of `like` where it was broadcast.

    Compilers merge this loop with those around it: for a CPU where it is one, for a GPU where pixels come first.
    """
    if like.numel() == 1 and gradient.ndim == 4 and gradient.is_cuda:
        return gradient.sum((2, 3)).sum().reshape(like.shape)
    return gradient.sum_to_size(like.shape)


class Quantizer(nn.Module):
    """A unified quantizer node of the training graph.

    Calling it maps a float tensor to one of the same shape with every value on the grid. Until
    `enabled` it returns its input unchanged, bit for bit.

    Args:
        family: a key of `FAMILIES`.
        role: "weight" or "activation".
        bits: 1 to 8.
        channels, axis: number of channels and their axis for a per-channel weight grid.
        zero_in_grid: False places an even number of levels symmetrically about zero (weights), where they fit.
        largest_code: the codes of a weight lie within ± this, whatever the family says.
        paired: at 8 bits the codes of a weight lie within ±127 and neighbours of one sign add up to 128 at most,
            where the family can choose a step for that; `largest_code` holds for other bits and families.
        signed: 8-bit codes of an activation lie about a zero point in their middle, whatever the family says.
        power_of_two: round every scale to the nearest power of two.
        delta: EWGS's δ; the family's own where None.
        mu: a constant μ.
    """

    def __init__(
        self,
        family: str,
        role: str,
        bits: int,
        *,
        channels: int | None = None,
        axis: int | None = None,
        zero_in_grid: bool = True,
        largest_code: int = LARGEST_CODE,
        paired: bool = False,
        signed: bool = False,
        power_of_two: bool = False,
        delta: float | None = None,
        mu: float = 0.0,
    ) -> None:
        super().__init__()
        if family not in FAMILIES:
            raise ValueError(f"unknown quantizer family {family!r}; known: {', '.join(FAMILIES)}")
        if role not in ("weight", "activation"):
            raise ValueError(f"role is 'weight' or 'activation', not {role!r}")
        self.family: Family = FAMILIES[family]
        self.role = role
        self.power_of_two = power_of_two
        self.enabled = False
        self.zero_in_grid = zero_in_grid
        self.largest_code = largest_code
        self.paired = paired
        self.signed = signed
        self.channels = channels
        self.axis = axis if channels is not None else None
        self.set_bits(bits)
        shape = () if channels is None else (channels,)
        for name in self.side.learned:
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        for name in self.side.constants:
            self.register_buffer(name, torch.ones(shape))
        chosen = self.side.delta if delta is None else delta
        self.register_buffer("minimum_scale", torch.full(shape, _SMALLEST_SCALE))
        self.register_buffer("delta", torch.tensor(float(chosen)))
        self.register_buffer("mu", torch.tensor(float(mu)))
        self.modulated = chosen != 0 or mu != 0

    minimum_scale: Tensor
    delta: Tensor
    mu: Tensor

    @property
    def side(self) -> Side:
        """What the family does for this quantizer's role."""
        return self.family.weight if self.role == "weight" else self.family.activation

    def set_bits(self, bits: int) -> None:
        """Change the number of levels; the caller calibrates afterwards."""
        if not 1 <= bits <= 8:
            raise ValueError(f"bits run from 1 to 8, not {bits}")
        self.bits = bits
        if self.role == "activation":
            apart = bits >= _ENDS_APART and not self.signed
            self.levels = Levels(bits, 0, 2**bits - 1, 0.0, None, True, apart=apart)
        else:
            with_zero = self.zero_in_grid and self.side.zero_in_grid
            paired = self.paired and bits == 8 and self.side.pairs
            most = LARGEST_CODE if paired else self.largest_code
            self.levels = replace(weight_levels(bits, most, with_zero, self.axis), paired=paired)

    @property
    def values(self) -> dict[str, Tensor]:
        """The family's learned parameters and constants, by name."""
        return {name: getattr(self, name) for name in (*self.side.learned, *self.side.constants)}

    @property
    def is_about_zero(self) -> bool:
        """Whether the grid is one of signed 8-bit codes about zero."""
        return self.signed and self.role == "activation" and self.bits == 8

    def interval(self, x: Tensor) -> Interval:
        """Where the grid stands now; differentiable in the learned parameters."""
        at = self.side.interval(self.values, x, self.levels)
        if self.is_about_zero:
            at = about_zero(at, self.levels.span)
        scale_in = self._guard(at.scale_in)
        scale_out = scale_in if at.scale_out is at.scale_in else self._guard(at.scale_out)
        lowest = at.lowest if self.role == "activation" else self._within_codes(at.lowest)
        return Interval(scale_in, at.offset, scale_out, lowest)

    def _within_codes(self, lowest: Tensor) -> Tensor:
        """The smallest q of a weight, moved so that all its codes (q, or 2q - 1) lie within what fits."""
        if self.levels.paired:
            return lowest
        least, most = -self.largest_code, self.largest_code
        if self.levels.half:
            least, most = -((self.largest_code - 1) // 2), (self.largest_code + 1) // 2
        return lowest.clamp(least, most - self.levels.span)

    def _guard(self, scale: Tensor) -> Tensor:
        """No dead range: a floor under the scale that lets the gradient through, and a ceiling."""
        scale = torch.nan_to_num(scale, nan=0.0, posinf=_LARGEST_SCALE).clamp(max=_LARGEST_SCALE)
        floor = torch.maximum(scale.detach(), self.minimum_scale)
        if self.power_of_two:
            floor = torch.exp2(torch.round(torch.log2(floor)))
        return straight_through(floor, scale)

    def transformed(self, x: Tensor) -> Tensor:
        """f(x)."""
        transform = self.side.transform
        return x if transform is None else transform(x, self.values, self.levels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        x = x.float()
        at = self.interval(x)
        return UnifiedQuantize.apply(  # type: ignore[no-any-return, no-untyped-call]
            self.transformed(x),
            along_axis(at.scale_in, self.axis, x.ndim),
            along_axis(at.offset, self.axis, x.ndim),
            None if at.scale_out is at.scale_in else along_axis(at.scale_out, self.axis, x.ndim),
            at.lowest,
            self.delta,
            self.mu,
            self.levels.span,
            self.levels.half,
            self.side.residual,
            self.modulated,
            self.levels.paired,
        )

    @torch.no_grad()
    def initialize(
        self,
        x: Tensor,
        method: str = "paper",
        least_scale: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Range:
        """Set the parameters from a sample of the tensor to be quantized and enable the node; returns the range.

        `method` is "paper" (the family's own), "minmax", "percentile", "mse" or "output", which weighs errors by
        `importance`, of the shape of `x`. A range whose step would be
        below `least_scale` (float32, of shape ()) is widened to it, and stays at least as wide in training.

        Raises:
            NotFiniteError: `x` holds NaN, or what is infinite in float32.
        """
        from sqakd_fx.quant.init_ranges import starting_range, widened

        x = x.detach().float()
        if not bool(torch.isfinite(x).all()):
            raise NotFiniteError(
                "NaN or infinity, which no grid holds: check the weights and the data"
            )
        levels = self.levels
        if self.is_about_zero and bool((x >= 0).all()):
            levels = replace(levels, bits=7, span=levels.span // 2)
        found = starting_range(x, levels, self.side.initial_range, method, importance)
        if least_scale is not None:
            found = widened(found, least_scale * self.levels.span)
        self.start_at(found)
        self.minimum_scale.fill_(_SMALLEST_SCALE)
        if "gain" in self.values:
            self._fit_gain(x)
        scale = self.interval(x).scale_out
        floor = torch.maximum(scale, scale.max() / 4) / 1024
        self.minimum_scale.copy_(floor if least_scale is None else floor.clamp_min(least_scale))
        self.enabled = True
        return found

    @torch.no_grad()
    def start_at(self, found: Range) -> None:
        """Set the parameters to those of a clipping range, float32 of shape () or (channels,)."""
        for name, value in self.side.from_range(found, self.levels).items():
            getattr(self, name).copy_(value)

    def _fit_gain(self, x: Tensor) -> None:
        """Output scale by least squares, so that the student starts close to the teacher."""
        self.gain.fill_(1.0)
        was, self.enabled = self.enabled, True
        quantized = self(x)
        self.enabled = was
        product = self.levels.reduce(x * quantized, torch.sum)
        energy = self.levels.reduce(quantized * quantized, torch.sum)
        self.gain.copy_(torch.where(product > 0, product / energy.clamp_min(1e-30), 1e-6))

    gain: Tensor

    @torch.no_grad()
    def code_scale(self, x: Tensor | None = None) -> Tensor:
        """The scale of `grid(x)`, on the device and without a synchronization."""
        scale = self.interval((self.minimum_scale if x is None else x).float()).scale_out
        return scale / 2 if self.levels.half else scale

    @torch.no_grad()
    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Of an activation's `grid()`, float32 of shape (), on the device and without a synchronization."""
        at = self.interval(self.minimum_scale)
        return at.scale_out.float(), -torch.round(at.lowest)

    @torch.no_grad()
    def grid(self, x: Tensor | None = None) -> Grid:
        """The integer grid as it is exported; `x` is needed where the range is a statistic of x.

        A grid without zero holds odd codes at half the step: (2q - 1) with scale s_out / 2.
        """
        like = self.minimum_scale if x is None else x
        at = self.interval(like.float())
        lowest = int(torch.round(at.lowest).item())
        scale = at.scale_out.detach().clone().float()
        if self.role == "activation":
            return Grid(scale, -lowest, 0, self.levels.span, self.bits, None)
        if self.levels.half:
            highest = 2 * (lowest + self.levels.span) - 1
            return Grid(scale / 2, 0, 2 * lowest - 1, highest, self.bits, self.axis)
        return Grid(scale, 0, lowest, lowest + self.levels.span, self.bits, self.axis)

    @torch.no_grad()
    def normalized(self, x: Tensor) -> Tensor:
        """v of the equations at the top of this file: `x` in steps of the grid, in float32, of its shape."""
        x = x.float()
        at = self.interval(x)
        scale = along_axis(at.scale_in, self.axis, x.ndim)
        offset = along_axis(at.offset, self.axis, x.ndim)
        return self.transformed(x) / scale + offset

    @torch.no_grad()
    def discretized(self, x: Tensor) -> Tensor:
        """q of the equations at the top of this file: whole numbers in float32, of the shape of `x`."""
        at = self.interval(x.float())
        clamped = self.normalized(x).clamp(at.lowest, at.lowest + self.levels.span)
        return torch.round(within_pairs(clamped) if self.levels.paired else clamped)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes (int32) of `x`, of its shape; `decode(codes, grid)` equals the forward."""
        q = self.discretized(x)
        if self.role == "activation":
            return (q - self.interval(x.float()).lowest).to(torch.int32)
        return (2 * q - 1 if self.levels.half else q).to(torch.int32)

    def extra_repr(self) -> str:
        where = "per-channel" if self.channels else "per-tensor"
        return f"{self.family.name}, {self.role}, {self.bits} bits, {where}"


def quantizers_of(module: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer by name, in the order of the module tree."""
    return {n: m for n, m in module.named_modules() if isinstance(m, Quantizer)}
