"""Sums, products and averages of codes."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from sqakd_fx.ir.op_table import Kind, Op, shape_of
from sqakd_fx.passes.lower_to_integer.average_pools import adaptive_pool_settings, pool_settings
from sqakd_fx.passes.lower_to_integer.builder import integer_operation
from sqakd_fx.passes.lower_to_integer.gates import gated
from sqakd_fx.passes.lower_to_integer.state import Lowering
from sqakd_fx.passes.lower_to_integer.values import Arithmetic, Codes

_OPS = torch.ops.sqakd_fx


def integer_arithmetic(lowering: Lowering, node: fx.Node, op: Op) -> Arithmetic | None:
    """The operation on codes; None where an input is no codes, or no integer kernel computes it."""
    inputs = [lowering.values[cast(fx.Node, node.args[i])] for i in op.activations]
    if not all(isinstance(value, Codes) for value in inputs):
        return None
    if op.gates_itself:
        return gated(lowering, node, inputs[0])
    if op.kind is not Kind.AVERAGE:
        return Arithmetic(node, integer_operation(op), tuple(inputs), ())
    ins, outs = shape_of(cast(fx.Node, node.args[0])) or (), shape_of(node) or ()
    if op.axes is None:
        keep = len(outs) == len(ins)
        return Arithmetic(node, integer_operation(op), tuple(inputs), (), keep_axes=keep)
    if len(ins) != op.axes + 2:
        return None
    if op.adaptive and all(size == 1 for size in outs[2:]):
        return Arithmetic(node, _OPS.global_average_pool.default, tuple(inputs), ())
    settings = (
        adaptive_pool_settings(ins[2:], outs[2:])
        if op.adaptive
        else pool_settings(node, lowering.modules, ins, outs)
    )
    if settings is None:
        return None
    return Arithmetic(node, integer_operation(op), tuple(inputs), settings)
