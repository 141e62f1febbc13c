"""Values of the integer program on their way: coded tensors, layers and sums that wait for a grid.

Behind an integer layer the float value is scale · accumulator. An affine behind it (BatchNorm, a bias)
multiplies the scale by |a| per channel, flips weight codes where a < 0, and adds an int32 bias.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
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
        self, graph: fx.Graph, node: fx.Node, outs: Sequence[int], ins: Sequence[int]
    ) -> fx.Node:
        """(N, C · phases, n + margin, ...) to the transposed convolution's output (N, C, ...)."""
        sizes = [n + m for n, m in zip(ins[2:], self.margin, strict=True)]
        whole = [n * s for n, s in zip(sizes, self.stride, strict=True)]
        made = node
        for axis in reversed(range(len(self.stride))):  # the runtime is quick where one axis moves
            if self.stride[axis] == 1:
                continue
            behind = math.prod(whole[axis + 1 :])
            apart = [-1, self.stride[axis], math.prod(sizes[: axis + 1]), behind]
            made = graph.call_function(torch.reshape, (made, apart))
            made = graph.call_function(torch.permute, (made, [0, 2, 1, 3]))
        if made is not node:
            made = graph.call_function(torch.reshape, (made, [-1, outs[1], *whole]))
        for axis, (size, start) in enumerate(zip(whole, self.padding, strict=True), start=2):
            if (start, outs[axis]) != (0, size):
                made = graph.call_function(torch.narrow, (made, axis, start, outs[axis]))
        return made

    def apply_to_any_size(
        self, graph: fx.Graph, node: fx.Node, outs: Sequence[int], ins: Sequence[int]
    ) -> fx.Node:
        """The same with the sizes of `node` in place of the example's, from which only the crop follows."""
        axes = range(len(self.stride))
        sizes: list[Any] = [
            graph.call_method("size", (node, axis)) for axis in range(2 + len(axes))
        ]
        made, batch, sizes = node, sizes[0], sizes[2:]
        whole = [_times(graph, size, s) for size, s in zip(sizes, self.stride, strict=True)]
        for axis in reversed(axes):
            if self.stride[axis] == 1:
                continue
            behind, front = 1, 1
            for size in whole[axis + 1 :]:
                behind = _times(graph, behind, size)
            for size in sizes[: axis + 1]:
                front = _times(graph, front, size)
            apart = [-1, self.stride[axis], front, behind]
            made = graph.call_function(torch.reshape, (made, apart))
            made = graph.call_function(torch.permute, (made, [0, 2, 1, 3]))
        if made is not node:
            made = graph.call_function(torch.reshape, (made, [batch, outs[1], *whole]))
        for axis, start in enumerate(self.padding, start=2):
            size = (ins[axis] + self.margin[axis - 2]) * self.stride[axis - 2]
            cut = start + size - start - outs[axis]
            if cut:
                kept = graph.call_function(operator.sub, (whole[axis - 2], cut))
                made = graph.call_function(torch.narrow, (made, axis, start, kept))
        return made


def _times(graph: fx.Graph, one: Any, other: Any) -> Any:
    """The product of two sizes, numbers or nodes; 1 is left out."""
    if 1 in (one, other) and not (isinstance(one, int) and isinstance(other, int)):
        return other if one == 1 else one
    return graph.call_function(operator.mul, (one, other)) if one != 1 or other != 1 else 1


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
