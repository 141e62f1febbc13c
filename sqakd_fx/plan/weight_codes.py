"""How large a weight's codes may be."""

from __future__ import annotations

from typing import cast

from torch import fx

from sqakd_fx.ir.meta import LayerSettings
from sqakd_fx.ir.op_table import Op, shape_of
from sqakd_fx.quant.levels import LARGEST_CODE, largest_weight_code


def largest_code(node: fx.Node, op: Op, settings: LayerSettings) -> int:
    """The largest |code| of a layer's weight with which no integer kernel overflows.

    Depthwise kernels add products in 32 bits on every processor, since a channel's products have no neighbours.
    """
    if is_depthwise(node, op):
        return LARGEST_CODE
    return largest_weight_code(settings.weight_range, settings.activation_bits)


def is_depthwise(node: fx.Node, op: Op | None) -> bool:
    """Whether each output channel of a convolution in canonical form reads one input channel of several."""
    if op is None or not op.is_convolution or op.transposed or op.weight is None:
        return False
    shape = shape_of(cast(fx.Node, node.args[op.weight]))
    groups = node.args[op.arguments.index("groups")]
    return shape is not None and shape[1] == 1 and isinstance(groups, int) and groups > 1
