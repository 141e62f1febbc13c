"""INT4 weights in blocks along the axis that a product sums over, the one form of INT4 that TensorRT takes.

    Before:  INT8 [N, K] → DequantizeLinear (N scales, axis 0) → Gemm
    After:   INT4 [N, K] → DequantizeLinear (N × K / block scales, axis 1, block_size) → Gemm

A trained grid has one scale for each output channel, or one for the weight: the blocks of a channel share it, and the
numbers are the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sqakd_fx.exporters.codes_as_floats import array_of, input_of, is_stored
from sqakd_fx.exporters.packed import StoredWeight, add_initializer, replace_initializer
from sqakd_fx.runtime.forms import stored_codes

_PRODUCTS = ("Gemm", "MatMul")


def to_int4_blocks(model: ir.Model, block: int) -> list[StoredWeight]:
    """Store the weights of products in INT4 whose codes and sizes allow it, in place; gives those."""
    found = []
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or not is_stored(node):
            continue
        codes, axis = input_of(node, 0), _summed_axis(node)
        if axis is None or len(codes.uses()) != 1 or not _fits(array_of(codes), axis, block):
            continue
        found.append(_in_blocks(model, node, axis, block))
    return found


def _summed_axis(node: ir.Node) -> int | None:
    """The axis of a weight that its product sums over; None where a weight is not that of products alone."""
    uses = list(node.outputs[0].uses())
    axes = set()
    for use in uses:
        if use.node.op_type not in _PRODUCTS or use.idx != 1:
            return None
        transposed = use.node.attributes.get("transB")
        axes.add(1 if transposed is not None and transposed.as_int() else 0)
    return axes.pop() if len(axes) == 1 else None


def _fits(codes: np.ndarray, axis: int, block: int) -> bool:
    if codes.dtype != np.int8 or codes.ndim != 2 or codes.shape[axis] % block:
        return False
    return bool(codes.min() >= -8 and codes.max() <= 7)


def _in_blocks(model: ir.Model, node: ir.Node, axis: int, block: int) -> StoredWeight:
    value, codes, scale = input_of(node, 0), array_of(input_of(node, 0)), array_of(node.inputs[1])
    name, count = str(value.name), codes.shape[axis] // block
    replace_initializer(model, value, stored_codes(codes, 4, name))
    channels = np.broadcast_to(scale.reshape(-1), (codes.shape[1 - axis],))
    scales = np.repeat(np.expand_dims(channels, axis), count, axis)
    stored = add_initializer(model, f"{name}_block_scale", np.ascontiguousarray(scales))
    node.replace_input_with(1, stored)
    if len(node.inputs) > 2:
        node.resize_inputs(2)
    node.attributes["axis"] = ir.AttrInt64("axis", axis)
    node.attributes["block_size"] = ir.AttrInt64("block_size", block)
    return StoredWeight(name, codes.size, 4, -(-codes.size // 2))
