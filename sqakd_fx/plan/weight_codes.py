"""How large a weight's codes may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from torch import fx

from sqakd_fx.ir.meta import LayerSettings
from sqakd_fx.ir.op_table import Op, shape_of
from sqakd_fx.quant.levels import LARGEST_CODE, largest_weight_code


@dataclass(frozen=True)
class WeightCodes:
    """The codes of a weight that fit: any within ±`largest`, or at 8 bits all of INT8 in pairs (`quant/levels.py`)."""

    largest: int
    paired: bool = False

    def with_those_of(self, other: WeightCodes) -> WeightCodes:
        """What fits in both."""
        both = (self, other)
        free = [codes.paired or codes.largest == LARGEST_CODE for codes in both]
        paired = all(free) and any(codes.paired for codes in both)
        return WeightCodes(min(self.largest, other.largest), paired)


ALL_CODES = WeightCodes(LARGEST_CODE)


def weight_codes(node: fx.Node, op: Op, settings: LayerSettings) -> WeightCodes:
    """The codes of a layer's weight with which no integer kernel overflows.

    Depthwise kernels add products in 32 bits on every processor, since a channel's products have no neighbours.
    """
    if is_depthwise(node, op):
        return ALL_CODES
    largest = largest_weight_code(settings.weight_range, settings.activation_bits)
    in_pairs = settings.weight_range == "paired" and largest < LARGEST_CODE
    return WeightCodes(largest, in_pairs and _pairs_channels(node, op))


def is_depthwise(node: fx.Node, op: Op | None) -> bool:
    """Whether each output channel of a convolution in canonical form reads one input channel of several."""
    if op is None or not op.is_convolution or op.transposed or op.weight is None:
        return False
    shape = shape_of(cast(fx.Node, node.args[op.weight]))
    groups = node.args[op.arguments.index("groups")]
    return shape is not None and shape[1] == 1 and isinstance(groups, int) and groups > 1


def _pairs_channels(node: fx.Node, op: Op) -> bool:
    """Whether every kernel adds products of neighbouring input channels, at one place of the kernel.

    Behind an odd number of channels some kernels pair the last one with the first of the next place, others with none.
    """
    shape = None if op.weight is None else shape_of(cast(fx.Node, node.args[op.weight]))
    if shape is None or op.transposed:
        return False
    return shape[1] % 2 == 0 or math.prod(shape[2:]) == 1
