"""A float model and the grids of its tensors in a JSON file: the form of Qualcomm's QNN and AIMET (version 1.0.0).

    Before:  Conv → QuantizeLinear → DequantizeLinear → Conv
    After:   Conv → Relu → Conv    and beside it {"name": "relu_quantized", "scale": [s], "offset": [-z], ...}

Weights are stored in float, on their grid. A real number is (q + offset) × scale, with codes q from 0 to 2^bw - 1. A
symmetric grid has the offset -2^(bw - 1). A tensor without an encoding is in float. Where the grid cuts values off
below 0, a Relu says so in the model as well; where it has fewer than 256 codes, a Clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from sqakd_fx.exporters.packed import add_initializer

SUFFIX = ".encodings"
VERSION = "1.0.0"
_MOST = 255
_ONE = np.ones((), np.float32)
"""The step of codes that are held as floats."""

Encoding = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Of one tensor: without a zero point it is symmetric; `scale` has one number, or one for each channel."""

    value: ir.Value
    bits: int
    scale: np.ndarray
    zero_point: int | None


def to_encodings(model: ir.Model) -> dict[str, Any]:
    """Turn a container model into a float model, in place; returns the content of its encodings file.

    Raises:
        ExportError: the model computes on codes in a way that has no float form.
    """
    computed = stored_codes_to_floats(model)
    stored = [n for n in model.graph if n.op_type == "DequantizeLinear" and is_stored(n)]
    activations = [
        _activation(model, node) for node in list(model.graph) if node.op_type == "QuantizeLinear"
    ]
    parameters: list[Grid] = []
    floats: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    for node in computed:
        replace_value(node.outputs[0], input_of(node, 0))
    for node in stored:
        key = input_of(node, 0), input_of(node, 1)
        if key not in floats:
            floats[key] = _stored(model, node, parameters)
        replace_value(node.outputs[0], floats[key])
    ir_passes.RemoveUnusedNodesPass()(model)
    forget_types(model)
    parameters += [Grid(rows, 8, _ONE, None) for rows in codes_to_floats(model)]
    return {
        "version": VERSION,
        "activation_encodings": list(map(_encoding, activations)),
        "param_encodings": list(map(_encoding, parameters)),
    }


def _encoding(grid: Grid) -> Encoding:
    bits, scale, zero_point = grid.bits, grid.scale, grid.zero_point
    offset = -(2 ** (bits - 1)) if zero_point is None else -zero_point
    return {
        "name": str(grid.value.name),
        "dtype": "INT",
        "bw": bits,
        "is_sym": zero_point is None,
        "enc_type": "PER_CHANNEL" if scale.ndim else "PER_TENSOR",
        "scale": [float(step) for step in scale.reshape(-1)],
        "offset": [offset] * scale.size,
    }


def _activation(model: ir.Model, node: ir.Node) -> Grid:
    """The floats in place of a QuantizeLinear and its Clip of codes, and their grid."""
    x, scale, zero_point = input_of(node, 0), array_of(node.inputs[1]), array_of(node.inputs[2])
    around = bounded(node)
    out, stem = around.last.outputs[0], str(around.last.outputs[0].name)
    low, high = around.low - int(zero_point), around.high - int(zero_point)
    if (around.low, around.high) != (0, _MOST):
        ends = float_bounds(model, stem, scale, (low, high))
        made = ir.node("Clip", [x, *ends], name=f"{stem}/Clip")
    elif low == 0:
        made = ir.node("Relu", [x], name=f"{stem}/Relu")
    else:
        made = ir.node("Identity", [x], name=f"{stem}/Identity")
    floats = made.outputs[0]
    out.name, floats.name = f"{stem}/codes", stem
    model.graph.insert_before(node, [made])
    ir.convenience.replace_all_uses_with(out, floats)
    if made.op_type == "Identity" and len(x.uses()) == 2 and not x.is_graph_output():
        ir.convenience.replace_all_uses_with(floats, x)
        floats = x
    return Grid(floats, 8, scale, int(zero_point))


def _stored(model: ir.Model, node: ir.Node, parameters: list[Grid]) -> ir.Value:
    """Stored codes as floats; weights and constants have a grid, biases none."""
    value = input_of(node, 0)
    codes, scale = array_of(value), array_of(node.inputs[1])
    zero_point = int(array_of(node.inputs[2])) if codes.dtype == np.uint8 else None
    axis = node.attributes.get_int("axis", 1) % max(codes.ndim, 1)
    shape = [-1 if index == axis else 1 for index in range(codes.ndim)]
    step = scale.reshape(shape) if scale.ndim else scale
    real = (codes.astype(np.float32) - np.float32(zero_point or 0)) * step
    floats = add_initializer(model, f"{value.name}_float", real.astype(np.float32))
    if codes.dtype != np.int32:
        small = zero_point is None and codes.size and codes.min() >= -8 and codes.max() <= 7
        parameters.append(Grid(floats, 4 if small else 8, scale, zero_point))
    return floats
