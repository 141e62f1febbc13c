"""Convolutions with groups in forms that ONNX Runtime's integer kernel computes as fast as the float one.

Measured by `benchmarks/layer_forms.py`: with m outputs a channel the kernel takes 5 to 15 times as long as for as many
plain depthwise channels. With fewer than 16 input channels a group it takes 2 to 4 times as long as for 16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sqakd_fx.passes.lower_to_integer.values import Layer

_CHANNELS_A_GROUP = 16


def fast_form(layer: Layer) -> tuple[Layer, Tensor | None]:
    """The layer in another form with the same sums, and which input channels it reads where that is not each once."""
    if layer.weight is None or layer.op.is_linear or len(layer.arguments) != 4:
        return layer, None
    groups, outputs = int(layer.arguments[3]), len(layer.weight)
    if groups == 1 or (groups == outputs and layer.weight.shape[1] == 1):
        return layer, None
    if layer.weight.shape[1] == 1:
        channels = torch.arange(groups).repeat_interleave(outputs // groups)
        return _in_groups(layer, layer.weight, outputs), channels
    return _in_wider_groups(layer, layer.weight, groups), None


def _in_groups(layer: Layer, codes: Tensor, groups: int) -> Layer:
    return replace(layer, weight=codes, arguments=(*layer.arguments[:3], groups))


def _in_wider_groups(layer: Layer, codes: Tensor, groups: int) -> Layer:
    """Several groups as one, whose weights are 0 between channels that were apart.

    Weights of one bit have no 0.
    """
    inside = codes.shape[1]
    divisors = [n for n in range(1, groups + 1) if groups % n == 0]
    joined = next((n for n in divisors if n * inside >= _CHANNELS_A_GROUP), groups)
    if joined == 1 or (layer.weight_grid is not None and layer.weight_grid.bits == 1):
        return layer
    wide = codes.new_zeros(len(codes), joined, *codes.shape[1:])
    group = torch.arange(groups).repeat_interleave(len(codes) // groups)
    wide[torch.arange(len(codes)), group % joined] = codes
    return _in_groups(layer, wide.flatten(1, 2), groups // joined)
