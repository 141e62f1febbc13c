"""Values of the integer program on their way: coded tensors, layers and sums that wait for a grid.

Behind an integer layer the float value is scale · accumulator. An affine behind it (BatchNorm, a bias)
multiplies the scale by |a| per channel, flips weight codes where a < 0, and adds an int32 bias.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from sqakd_fx.ir.op_table import Op, convolution
from sqakd_fx.passes.lower_to_integer.clips import Clip
from sqakd_fx.quant.batch_norm import absorb
from sqakd_fx.quant.grid import Grid


@dataclass(frozen=True)
class StoredGrid:
    """A grid, and the names under which the lowered graph stores its scale and its zero point."""

    grid: Grid
    scale: str
    zero_point: str

    def clipped(self, qmin: int, qmax: int) -> StoredGrid:
        """The grid with another range of codes."""
        return replace(self, grid=replace(self.grid, qmin=qmin, qmax=qmax))


@dataclass(frozen=True)
class Codes:
    """A tensor of uint8 codes in the lowered graph: what an integer operation reads as codes, scale, zero point."""

    node: fx.Node
    stored: StoredGrid

    @property
    def grid(self) -> Grid:
        return self.stored.grid


@dataclass(frozen=True)
class Unfolding:
    """How the phases of a transposed convolution are put together, per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    margin: tuple[int, ...]

    def apply(
        self,
        graph: fx.Graph,
        node: fx.Node,
        sizes: Sequence[int | fx.Node],
        outs: Sequence[int],
        ins: Sequence[int],
    ) -> fx.Node:
        """(N, C · phases, n + margin, ...) to the transposed convolution's output (N, C, ...).

        `sizes` are those of `node` without its channels, -1 for any batch. `outs` and `ins` are the example's shapes,
        from which only the crop follows.
        """
        batch, *given = sizes
        whole = [_product(graph, [n, s]) for n, s in zip(given, self.stride, strict=True)]
        made = node
        for axis in reversed(range(len(self.stride))):  # the runtime is quick where one axis moves
            if self.stride[axis] == 1:
                continue
            front, behind = (_product(graph, x) for x in (given[: axis + 1], whole[axis + 1 :]))
            apart = [-1, self.stride[axis], front, behind]
            made = graph.call_function(torch.reshape, (made, apart))
            made = graph.call_function(torch.permute, (made, [0, 2, 1, 3]))
        if made is not node:
            made = graph.call_function(torch.reshape, (made, [batch, outs[1], *whole]))
        for axis, (size, start) in enumerate(zip(whole, self.padding, strict=True), start=2):
            example = (ins[axis] + self.margin[axis - 2]) * self.stride[axis - 2]
            cut = example - outs[axis]
            if cut:
                left = (
                    size - cut
                    if isinstance(size, int)
                    else graph.call_function(operator.sub, (size, cut))
                )
                made = graph.call_function(torch.narrow, (made, axis, start, left))
        return made


def _product(graph: fx.Graph, factors: Iterable[int | fx.Node]) -> int | fx.Node:
    """Of numbers, and of sizes that the graph computes; a factor of 1 is left out."""
    made: int | fx.Node = 1
    for factor in factors:
        if isinstance(made, int) and isinstance(factor, int):
            made *= factor
        elif made == 1 or factor == 1:
            made = factor if made == 1 else made
        else:
            made = graph.call_function(operator.mul, (made, factor))
    return made


@dataclass(frozen=True)
class Layer:
    """An integer layer whose accumulator has not been turned into codes or floats yet."""

    source: fx.Node
    op: Op
    inputs: tuple[Codes, ...]
    arguments: tuple[Any, ...]
    weight: Tensor | None
    weight_grid: Grid | None
    scale: Tensor
    bias: Tensor | None
    clip: Clip = field(default_factory=Clip)
    unfolding: Unfolding | None = None


@dataclass(frozen=True)
class Arithmetic:
    """A sum, product or average of coded tensors, waiting for its output grid."""

    source: fx.Node
    target: Any
    inputs: tuple[Codes, ...]
    arguments: tuple[Any, ...]
    clip: Clip = field(default_factory=Clip)
    keep_axes: bool = True


def with_affine(layer: Layer, a: Tensor, b: Tensor) -> Layer:
    """The layer with y = a x + b behind it: in its weight scale, signs of codes, and int32 bias."""
    assert layer.weight is not None
    assert layer.weight_grid is not None
    codes, grid = layer.weight, layer.weight_grid
    if layer.unfolding is not None:
        phases = math.prod(layer.unfolding.stride)
        a, b = a.repeat_interleave(phases), b.repeat_interleave(phases)
    at = absorb(a, b, layer.inputs[0].grid.scale, grid.scale)
    keep = torch.where(at.dead, 0.0, at.sign).to(torch.int8)
    plain = bool((at.sign == 1).all()) and grid.axis is None and bool((at.unit == at.unit[0]).all())
    return replace(
        layer,
        weight=codes * keep.reshape(-1, *[1] * (codes.ndim - 1)),
        weight_grid=replace(
            grid,
            scale=at.weight_scale[0] if plain else at.weight_scale,
            axis=grid.axis if plain else 0,
        ),
        scale=at.unit[0] if plain else at.unit,
        bias=at.bias.to(torch.int32),
    )


def as_convolution(layer: Layer) -> Layer:
    """A transposed convolution as a convolution with one output channel for every phase.

    y[s i + r] = Σ_j x[i - j] w[s j + r]: for each phase r < s a convolution with the reversed taps
    w[r], w[s + r], ...; interleaving the phases and cutting the padding gives y.
    """
    if not layer.op.transposed:
        return layer
    assert layer.weight is not None
    assert layer.weight_grid is not None
    stride, padding, extra, groups, dilation = layer.arguments
    weight, axes = layer.weight, len(stride)
    spread = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    taps = [
        -(-(size + max(e - p, 0)) // s)
        for size, s, e, p in zip(spread, stride, extra, padding, strict=True)
    ]
    full = weight.new_zeros(*weight.shape[:2], *(t * s for t, s in zip(taps, stride, strict=True)))
    places: tuple[Any, ...] = (
        ...,
        *(slice(None, size, d) for size, d in zip(spread, dilation, strict=True)),
    )
    full[places] = weight
    outputs = weight.shape[1]
    split = [n for t, s in zip(taps, stride, strict=True) for n in (t, s)]
    by_phase = full.reshape(groups, -1, outputs, *split)
    tap_axes = [3 + 2 * i for i in range(axes)]
    phase_axes = [4 + 2 * i for i in range(axes)]
    reordered = by_phase.permute(0, 2, *phase_axes, 1, *tap_axes).flip(*range(-axes, 0))
    phases = math.prod(stride)
    codes = reordered.reshape(groups * outputs * phases, -1, *taps).contiguous()

    def repeated(x: Tensor) -> Tensor:
        return x if x.ndim == 0 else x.repeat_interleave(phases)

    grid = layer.weight_grid
    return replace(
        layer,
        op=convolution(axes),
        arguments=([1] * axes, [t - 1 for t in taps], [1] * axes, groups),
        weight=codes,
        weight_grid=replace(
            grid, scale=repeated(grid.scale), axis=None if grid.axis is None else 0
        ),
        scale=repeated(layer.scale),
        unfolding=Unfolding(tuple(stride), tuple(padding), tuple(t - 1 for t in taps)),
    )
