"""Tensors whose codes are no INT8 about zero point 0: rounded in float in a file for TensorRT, with their readers.

    Before:  QuantizeLinear (UINT8, codes 0 to 255) → DequantizeLinear → Conv with INT8 weights
    After:   Div → Round → Clip → Mul → Conv with float weights

The numbers are the same. The layers run in float, so that a file in which half of them would, or more, is refused.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.codes_as_floats import (
    CARRIED,
    array_of,
    bounded,
    input_of,
    is_read_from_codes,
    is_stored,
)
from sqakd_fx.exporters.names import mark, marked_tensor
from sqakd_fx.exporters.packed import add_initializer

LEAST, MOST = -128, 127
"""INT8."""
_SUMS = ("Add", "Sub")
_BOUND = "Clip"
_CLIPS = ("Relu", _BOUND)
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def about_zero(node: ir.Node) -> tuple[int, int]:
    """The smallest and the largest code of a QuantizeLinear, about zero point 0."""
    around, zero_point = bounded(node), int(array_of(node.inputs[2]))
    return around.low - zero_point, around.high - zero_point


def without_int8(model: ir.Model) -> set[ir.Node]:
    """Every QuantizeLinear whose codes do not fit, and of a sum that reads one: TensorRT fuses sums of codes alone."""
    found: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and (
            _is_beyond(*about_zero(node)) or _is_of_a_sum(node, found)
        ):
            found.add(node)
    return found


def first_without_int8(model: ir.Model) -> str:
    """The first tensor whose codes do not fit, in words; empty where all do."""
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and _is_beyond(*about_zero(node)):
            low, high = about_zero(node)
            name = bounded(node).last.outputs[0].name
            return f"{name}: codes from {low} to {high} about zero point 0"
    return ""


def _is_beyond(low: int, high: int) -> bool:
    return low < LEAST or high > MOST


def _is_of_a_sum(node: ir.Node, in_float: Set[ir.Node]) -> bool:
    made = input_of(node, 0).producer()
    while made is not None and made.op_type in _CLIPS:
        made = input_of(made, 0).producer()
    if made is None or made.op_type not in _SUMS:
        return False
    read = [x.producer() for x in made.inputs if x is not None]
    return any(
        one is not None
        and one.op_type == "DequantizeLinear"
        and not quantizers_behind(one).isdisjoint(in_float)
        for one in read
    )


def quantizers_behind(reader: ir.Node) -> set[ir.Node]:
    """Every QuantizeLinear whose codes a DequantizeLinear reads, as they are or moved."""
    found: set[ir.Node] = set()
    seen: set[ir.Value] = set()
    waiting = [input_of(reader, 0)]
    while waiting:
        value = waiting.pop()
        made = value.producer()
        if made is None or value in seen:
            continue
        seen.add(value)
        if made.op_type == "QuantizeLinear":
            found.add(made)
        elif made.op_type in CARRIED:
            carried = CARRIED[made.op_type]
            waiting += [
                x
                for index, x in enumerate(made.inputs)
                if x is not None and (carried is None or index in carried)
            ]
    return found


def rounded(model: ir.Model, node: ir.Node) -> ir.Value:
    """The floats behind a QuantizeLinear, its Clip and a DequantizeLinear, without codes."""
    last = bounded(node).last
    out, scale = last.outputs[0], input_of(node, 1)
    stem, tensor = str(out.name), marked_tensor(out)
    low, high = about_zero(node)
    ends = (
        add_initializer(model, f"{stem}_{name}", np.float32(code))
        for name, code in (("lower", low), ("upper", high))
    )
    value = input_of(node, 0)
    out.name = f"{stem}/unsigned"
    for kind, others in (("Div", [scale]), ("Round", []), (_BOUND, [*ends]), ("Mul", [scale])):
        made = ir.node(kind, [value, *others], name=f"{stem}/{kind}")
        value = made.outputs[0]
        value.name = stem if kind == _BOUND else f"{stem}/{kind}:0"
        if kind == _BOUND and tensor is not None:
            mark(value, replace(tensor, qmin=low, qmax=high))
        model.graph.insert_before(last, [made])
    return value


def describe_float_codes(model: ir.Model) -> None:
    """Types and notes of the codes that are floats."""
    for node in model.graph:
        tensor = marked_tensor(node.outputs[0]) if node.op_type == _BOUND else None
        if tensor is not None:
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            mark(node.outputs[0], tensor)


def weights_to_floats(model: ir.Model, told: str) -> list[str]:
    """Float weights for layers with float activations; returns what is to be said.

    Raises:
        ExportError: these are half of the layers or more; it begins with what is `told`.
    """
    layers = [
        (node, weight)
        for node in model.graph
        if node.op_type in _WEIGHTED
        and (weight := input_of(node, 1).producer()) is not None
        and weight.op_type == "DequantizeLinear"
        and is_stored(weight)
    ]
    floats = [(node, weight) for node, weight in layers if not is_read_from_codes(node.inputs[0])]
    if 2 * len(floats) >= len(layers):
        raise ExportError(
            f"{told} are no INT8, which TensorRT needs, and {len(floats)} of {len(layers)} layers would run in "
            "float: train with --target tensorrt, or with 7 bits here"
        )
    for node, weight in floats:
        if weight.outputs[0].uses():
            stored = add_initializer(model, f"{input_of(weight, 0).name}_float", _floats(weight))
            node.replace_input_with(1, stored)
    return [
        f"{len(floats)} of {len(layers)} layers run in float ({told} are no INT8): --target tensorrt trains grids that "
        "fit"
    ]


def _floats(node: ir.Node) -> np.ndarray:
    """What a DequantizeLinear makes of stored codes about zero point 0."""
    codes, scale = array_of(input_of(node, 0)), array_of(node.inputs[1])
    if scale.ndim:
        sizes = [1] * codes.ndim
        sizes[node.attributes.get_int("axis", 1)] = -1
        scale = scale.reshape(sizes)
    floats: np.ndarray = (codes * scale).astype(np.float32)
    return floats
