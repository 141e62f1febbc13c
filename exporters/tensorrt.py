"""TensorRT: INT8 codes about zero point 0, float biases, a Q/DQ pair in front of every input of an integer layer.

    Before:  QuantizeLinear (UINT8, zero point z) → Clip → MaxPool of codes → DequantizeLinear → Conv
    After:   Clip → QuantizeLinear (INT8, 0) → DequantizeLinear → MaxPool → QuantizeLinear → DequantizeLinear → Conv

A code q about a zero point z is the code q - z about 0: the same number. That fits INT8 where codes and zero point do:
7 bits or fewer always, 8 bits on a signed grid, which `target = "tensorrt"` trains. Tensors that do not fit are rounded
in float, and the layers that read them run in float; where that is half of the layers or more, nothing is written.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from sqakd_fx.exporters.codes_as_floats import (
    array_of,
    bounded,
    codes_to_floats,
    float_bounds,
    forget_types,
    input_of,
    is_stored,
    replace_value,
    stored_codes_to_floats,
)
from sqakd_fx.exporters.names import mark, marked_tensor
from sqakd_fx.exporters.packed import add_initializer
from sqakd_fx.exporters.tensorrt_floats import (
    LEAST,
    MOST,
    about_zero,
    describe_float_codes,
    first_without_int8,
    quantizers_behind,
    rounded,
    weights_to_floats,
    without_int8,
)

QUANTIZED_LAYERS = (
    "Add",
    "AveragePool",
    "Conv",
    "Gemm",
    "GlobalAveragePool",
    "MatMul",
    "Mul",
    "Sub",
)
"""What TensorRT fuses with the DequantizeLinear of its inputs."""
_MOVES = (
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
"""What gives numbers of its first input and no others."""


def to_tensorrt(model: ir.Model) -> list[str]:
    """Turn a container model into one that TensorRT takes, in place; returns what is to be said of it.

    Raises:
        ExportError: half of the layers or more read grids that are no INT8 about zero point 0, or the model computes on
            codes in a way that has no float form.
    """
    in_float = without_int8(model)
    told = first_without_int8(model)
    sums = _float_sums(model)
    readers = stored_codes_to_floats(model)
    quantized = {
        value: rounded(model, node) if node in in_float else _symmetric(model, node)
        for node in list(model.graph)
        if node.op_type == "QuantizeLinear"
        for value in (bounded(node).last.outputs[0],)
    }
    moved: dict[ir.Value, ir.Value] = {}
    for node in readers:
        if quantizers_behind(node).isdisjoint(in_float):
            _read_floats(model, node, quantized, moved, sums)
        else:
            replace_value(node.outputs[0], input_of(node, 0))
    for codes, floats in quantized.items():
        replace_value(codes, floats)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and is_stored(node):
            _stored(model, node)
    _quantize_moves(model, sums)
    said = weights_to_floats(model, told) if in_float else []
    codes_to_floats(model)
    ir_passes.RemoveUnusedNodesPass()(model)
    forget_types(model)
    describe_float_codes(model)
    return said


def _zero(model: ir.Model) -> ir.Value:
    known = model.graph.initializers.get("zero_point_int8")
    return known or add_initializer(model, "zero_point_int8", np.zeros((), np.int8))


def _symmetric(model: ir.Model, node: ir.Node) -> ir.Value:
    """The floats behind a QuantizeLinear, its Clip in floats, and a DequantizeLinear, all about zero point 0."""
    around = bounded(node)
    out, x = around.last.outputs[0], input_of(node, 0)
    stem, scale = str(out.name), array_of(node.inputs[1])
    low, high = about_zero(node)
    if (low, high) == (0, MOST):
        x = _then(model, around.last, "Relu", stem, x)
    elif (low, high) != (LEAST, MOST):
        ends = float_bounds(model, stem, scale, (low, high))
        x = _then(model, around.last, "Clip", stem, x, *ends)
    pair = _pair(model, around.last, stem, x, input_of(node, 1))
    codes = input_of(pair, 0)
    tensor = marked_tensor(out)
    out.name, codes.name = f"{stem}/unsigned", stem
    codes.shape = out.shape
    if tensor is not None:
        mark(codes, replace(tensor, qmin=low, qmax=high))
    return pair.outputs[0]


def _then(model: ir.Model, before: ir.Node, kind: str, stem: str, *inputs: ir.Value) -> ir.Value:
    made = ir.node(kind, list(inputs), name=f"{stem}/{kind}")
    made.outputs[0].name = f"{stem}/{kind}:0"
    model.graph.insert_before(before, [made])
    return made.outputs[0]


def _pair(model: ir.Model, before: ir.Node, stem: str, x: ir.Value, scale: ir.Value) -> ir.Node:
    """QuantizeLinear and DequantizeLinear of INT8 codes; gives the latter.

    A zero point that a DequantizeLinear has not is 0. ONNX Runtime 1.31 fails where it copies one that says INT8.
    """
    codes = _then(model, before, "QuantizeLinear", stem, x, scale, _zero(model))
    codes.type = ir.TensorType(ir.DataType.INT8)
    floats = _then(model, before, "DequantizeLinear", stem, codes, scale)
    made = floats.producer()
    assert made is not None
    return made


def _read_floats(
    model: ir.Model,
    node: ir.Node,
    quantized: dict[ir.Value, ir.Value],
    moved: dict[ir.Value, ir.Value],
    sums: set[ir.Node],
) -> None:
    """The floats of moved codes in place of a DequantizeLinear; integer layers read them through a pair, in `moved`."""
    codes, out = input_of(node, 0), node.outputs[0]
    layers = [
        use for use in out.uses() if use.node.op_type in QUANTIZED_LAYERS and use.node not in sums
    ]
    if codes not in quantized and layers:
        if codes not in moved:
            stem = f"{codes.name}/moved"
            moved[codes] = _pair(model, node, stem, codes, input_of(node, 1)).outputs[0]
        for use in layers:
            use.node.replace_input_with(use.idx, moved[codes])
    replace_value(out, codes)


def _float_sums(model: ir.Model) -> set[ir.Node]:
    """Sums of a quantized tensor and one that is computed in float: they read moved numbers without a pair."""

    def is_float(value: ir.Value | None) -> bool:
        made = None if value is None else value.producer()
        return made is not None and made.op_type != "DequantizeLinear"

    return {n for n in model.graph if n.op_type in ("Add", "Sub") and any(map(is_float, n.inputs))}


def _quantize_moves(model: ir.Model, sums: set[ir.Node]) -> None:
    """A pair behind every move of quantized numbers, so that a runtime has none to add.

    ONNX Runtime 1.23 adds one of UINT8 behind a move whose DequantizeLinear has no zero point.
    """
    for node in list(model.graph):
        made = input_of(node, 0).producer() if node.op_type in _MOVES else None
        if made is None or made.op_type != "DequantizeLinear" or array_of(made.inputs[1]).ndim:
            continue
        for out in node.outputs:
            if not out.is_graph_output():
                _quantize_move(model, node, out, input_of(made, 1), sums)


def _quantize_move(
    model: ir.Model, move: ir.Node, out: ir.Value, scale: ir.Value, sums: set[ir.Node]
) -> None:
    uses = [use for use in out.uses() if use.node not in sums]
    quantized = [use.node for use in uses if use.node.op_type == "QuantizeLinear"]
    others = [use for use in uses if use.node not in quantized]
    if not others:
        return
    same = [next(iter(q.outputs[0].uses())).node for q in quantized if q.inputs[1] is scale]
    last = same[0] if same else _pair(model, move, f"{out.name}/moved", out, scale)
    pair = [node for node in (input_of(last, 0).producer(), last) if node is not None]
    model.graph.remove(pair)
    model.graph.insert_after(move, pair)
    for use in others:
        use.node.replace_input_with(use.idx, last.outputs[0])


def _stored(model: ir.Model, node: ir.Node) -> None:
    """A stored tensor: INT8 weights stay, UINT8 constants move to zero point 0 or become float, as a bias does."""
    value, scale = input_of(node, 0), array_of(node.inputs[1])
    codes = array_of(value)
    if codes.dtype == np.int32:
        bias = add_initializer(model, f"{value.name}_float", (codes * scale).astype(np.float32))
        replace_value(node.outputs[0], bias)
    elif codes.dtype == np.uint8:
        moved = codes.astype(np.int16) - int(array_of(node.inputs[2]))
        if moved.min(initial=0) < LEAST or moved.max(initial=0) > MOST:
            floats = (moved * scale).astype(np.float32)
            replace_value(node.outputs[0], add_initializer(model, f"{value.name}_float", floats))
        else:
            moved = moved.astype(np.int8)
            node.replace_input_with(0, add_initializer(model, f"{value.name}_int8", moved))
            node.replace_input_with(2, _zero(model))
