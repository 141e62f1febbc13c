"""Channels whose weights are all zero: their value is their bias, and it may lie between two codes.

A gate `clip(x / 6 + 0.5)` of such a channel is 0.5, which is 127.5 steps of 1 / 255: what the trained graph and a
runtime round it to depends on the last bit of a float. The bias in the file is that of the code itself, which the
trained graph gives.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from sqakd_fx.passes.lower_to_integer.values import Layer
from sqakd_fx.quant.grid import Grid, encode

_NEAR = 1e-3
"""Of a step: farther from a tie no float rounding moves a code."""


def off_ties(layer: Layer, grid: Grid) -> Layer:
    """The layer with biases of constant channels moved from ties of the grid that its result is put on."""
    if layer.weight is None or layer.bias is None:
        return layer
    unit = layer.scale.expand(layer.bias.shape)
    value = layer.bias.to(torch.float32) * unit
    steps = value / grid.scale
    near = (steps - steps.floor() - 0.5).abs() < _NEAR
    constant = (layer.weight.flatten(1) == 0).all(1)
    moved = torch.round((encode(value, grid) - grid.zero_point) * grid.scale / unit)
    found = torch.where(near & constant, moved, layer.bias.to(torch.float64))
    return replace(layer, bias=found.to(torch.int32))


def reads_alone(reader: fx.Node, layer: fx.Node) -> bool:
    """Whether nothing but one node reads what a layer gives, behind what only it reads."""
    while len(layer.users) == 1:
        (layer,) = layer.users
        if layer is reader:
            return True
    return False
