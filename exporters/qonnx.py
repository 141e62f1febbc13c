"""QONNX: float tensors with Quant and BipolarQuant nodes at arbitrary bits, for FPGA flows.

    Quant(x, scale, zero_point, bits; signed, narrow, rounding_mode)
        = (clip(round(x / scale + zero_point)) - zero_point) * scale

Weights are stored in float, already on their grid. A channel whose sign BatchNorm flipped has a negative
scale, and a grid without zero has the zero point -1/2. At 1 bit that is BipolarQuant, or a Quant of 2 bits
where a channel is 0: qonnx executes every signed Quant of 1 bit as bipolar. Where a clip narrows the codes
of an activation, a float Clip stands in front of its Quant.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from sqakd_fx.exporters.codes_as_floats import (
    array_of,
    bounded,
    float_bounds,
    input_of,
    is_stored,
    replace_value,
    stored_codes_to_floats,
)
from sqakd_fx.exporters.packed import add_initializer, pack_codes

DOMAIN = "qonnx.custom_op.general"


def to_qonnx(model: ir.Model) -> None:
    """Turn a container model into QONNX, in place.

    Raises:
        ExportError: the model computes on codes in a way that has no float form.
    """
    stored_codes_to_floats(model)
    stored: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            _activation(model, node)
        elif node.op_type == "DequantizeLinear" and not is_stored(node):
            replace_value(node.outputs[0], input_of(node, 0))
        elif node.op_type == "DequantizeLinear":
            # of a layer that is called more than once, the same codes are dequantized as often
            codes = input_of(node, 0), input_of(node, 1)
            if codes not in stored:
                stored[codes] = _dequantized(model, node)
            replace_value(node.outputs[0], stored[codes])
    model.opset_imports[DOMAIN] = 1
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            node.metadata_props.update(value.metadata_props)
            value.metadata_props.clear()
            if value not in outputs:
                value.type = value.shape = None
    ir_passes.RemoveUnusedNodesPass()(model)


def _number(model: ir.Model, name: str, value: object) -> ir.Value:
    known = model.graph.initializers.get(name)
    return known or add_initializer(model, name, np.asarray(value, np.float32))


def _activation(model: ir.Model, node: ir.Node) -> None:
    """QuantizeLinear, and the Clip of codes behind it, become Clip and Quant."""
    x, scale = node.inputs[0], array_of(node.inputs[1])
    zero_point = int(array_of(node.inputs[2]))
    around = bounded(node)
    last, low, high = around.last, around.low, around.high
    out = last.outputs[0]
    bits = int(out.metadata_props.get("sqakd_fx.bits", "8"))
    stem = str(out.name)
    made = []
    if (low, high) != (0, 2**bits - 1):
        bounds = float_bounds(model, stem, scale, (low - zero_point, high - zero_point))
        made.append(ir.node("Clip", [x, *bounds], name=f"{stem}/Clip"))
        made[-1].outputs[0].name = f"{stem}/Clip:0"
        x = made[-1].outputs[0]
    parameters = [
        _number(model, f"{stem}_scale", scale),
        _number(model, f"{stem}_zero_point", zero_point),
        _number(model, f"bits_{bits}", bits),
    ]
    attributes = {"signed": 0, "narrow": 0, "rounding_mode": "ROUND"}
    made.append(ir.node("Quant", [x, *parameters], attributes, domain=DOMAIN, name=f"{stem}/Quant"))
    model.graph.insert_before(node, made)
    new = made[-1].outputs[0]
    new.metadata_props.update(out.metadata_props)
    ir.convenience.replace_all_uses_with(out, new)
    name, out.name = out.name, f"{stem}_codes"
    new.name = name
    if last is not node:
        model.graph.remove(last)
    model.graph.remove(node)


def _dequantized(model: ir.Model, node: ir.Node) -> ir.Value:
    """Stored codes as floats, behind a Quant where they are weights."""
    value = input_of(node, 0)
    codes, scale = array_of(value), array_of(node.inputs[1])
    if codes.dtype == np.uint8:
        codes = codes - array_of(node.inputs[2]).astype(np.int32)
    wide = scale.reshape(-1, *[1] * (codes.ndim - 1)) if scale.ndim else scale
    stem = str(value.name)
    if codes.dtype != np.int8 or codes.ndim < 2:
        return add_initializer(model, f"{stem}_float", (codes * wide).astype(np.float32))
    bits = int(value.metadata_props.get("sqakd_fx.bits", "8"))
    packing = pack_codes(codes, (max(bits, 2),)) or pack_codes(codes, (8,))
    assert packing is not None
    a, b = (x.reshape(-1, *[1] * (codes.ndim - 1)) if x.ndim else x for x in (packing.a, packing.b))
    real = add_initializer(model, f"{stem}_float", (codes * wide).astype(np.float32))
    if bits == 1 and (packing.b != 0).all():
        inputs = [real, _number(model, f"{stem}_step", wide)]
        quant = ir.node("BipolarQuant", inputs, domain=DOMAIN, name=f"{stem}/BipolarQuant")
    else:
        inputs = [
            real,
            _number(model, f"{stem}_step", wide * a),
            _number(model, f"{stem}_zero_point", -b / a),
            _number(model, f"bits_{packing.bits}", packing.bits),
        ]
        attributes = {"signed": 1, "narrow": 0, "rounding_mode": "ROUND"}
        quant = ir.node("Quant", inputs, attributes, domain=DOMAIN, name=f"{stem}/Quant")
    quant.outputs[0].name = f"{stem}/Quant:0"
    quant.outputs[0].metadata_props.update(value.metadata_props)
    model.graph.insert_before(node, [quant])
    return quant.outputs[0]
