"""Convolutions, linear layers and matrix products on codes, and the BatchNorm behind or beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import fx

from sqakd_fx.errors import PassError
from sqakd_fx.ir.op_table import Op, convolution, shape_of
from sqakd_fx.passes.lower_to_integer.state import Lowering
from sqakd_fx.passes.lower_to_integer.values import Codes, Layer, as_convolution, with_affine
from sqakd_fx.quant.batch_norm import (
    AFFINE_CODE,
    AFFINE_SCALE,
    AbsorbedBatchNorm,
    AffineBatchNorm,
    affine_of,
)
from sqakd_fx.quant.grid import Grid
from sqakd_fx.quant.quantizer import Quantizer


def integer_layer(lowering: Lowering, node: fx.Node, op: Op) -> Layer:
    """A layer whose inputs are codes, with its rounded bias where it has one."""
    inputs = [lowering.values[cast(fx.Node, node.args[i])] for i in op.activations]
    if not all(isinstance(value, Codes) for value in inputs):
        raise PassError(f"{node.name} has an input that is not on a grid", node=node.name)
    x = inputs[0]
    if op.weight is None:
        scale = x.grid.scale * inputs[1].grid.scale
        return Layer(node, op, tuple(inputs), (), None, None, scale, None)
    quantizer_node = cast(fx.Node, node.args[op.weight])
    quantizer = cast(Quantizer, lowering.modules[str(quantizer_node.target)])
    weight = lowering.constant(quantizer_node.args[0])
    grid = quantizer.grid(weight)
    grid = replace(grid, scale=grid.scale.cpu())
    codes = quantizer.codes(weight).to(torch.int8).cpu()
    scale = x.grid.scale * grid.scale
    layer = as_convolution(Layer(node, op, (x,), tuple(node.args[3:]), codes, grid, scale, None))
    rounding = node.args[2]
    if isinstance(rounding, fx.Node) and rounding.op == "call_module":
        bias = lowering.constant(rounding.args[0]).float().cpu()
        return with_affine(layer, torch.ones_like(bias), bias)
    return layer


def with_batch_norm(lowering: Lowering, node: fx.Node, module: AbsorbedBatchNorm) -> Layer:
    """The layer in front of an absorbed BatchNorm, with it."""
    source = cast(fx.Node, node.args[0])
    layer = lowering.values[source]
    assert isinstance(layer, Layer)
    a, b = (t.detach().float().cpu() for t in affine_of(module.batch_norm))
    if len(node.args) > 2:
        b = b + a * lowering.constant(node.args[2]).float().cpu()
    return with_affine(layer, a, b)


def batch_norm_alone(lowering: Lowering, node: fx.Node, module: AffineBatchNorm) -> Layer:
    """A BatchNorm of its own: a depthwise 1 × 1 convolution with one weight code a channel."""
    x = lowering.values[cast(fx.Node, node.args[0])]
    assert isinstance(x, Codes)
    axes = len(shape_of(node) or ()) - 2
    op = convolution(axes)
    a, b = (t.detach().float().cpu() for t in affine_of(module.batch_norm))
    ones = torch.full((len(a), 1, *[1] * axes), AFFINE_CODE, dtype=torch.int8)
    grid = Grid(AFFINE_SCALE, 0, -AFFINE_CODE, AFFINE_CODE, 8)
    geometry = ([1] * axes, [0] * axes, [1] * axes, len(a))
    scale = x.grid.scale * AFFINE_SCALE
    return with_affine(Layer(node, op, (x,), geometry, ones, grid, scale, None), a, b)
