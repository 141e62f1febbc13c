"""Weights that several layers read are stored once, and each layer reads them under a name of its own.

On processors without 8-bit dot products ONNX Runtime makes unsigned codes of a weight for every layer
(session.x64quantprecision) and fails where two layers would get one tensor. A Reshape to the same shape, which
the runtime folds when it loads the model, tells them apart.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from sqakd_fx.exporters.packed import add_initializer

_PACKING = ("Cast", "Mul", "Add")


def read_apart(model: ir.Model) -> None:
    """Put a Reshape in front of every reader of a weight but the first."""
    times: dict[ir.Value, int] = {}
    for node in list(model.graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        tensor = None if codes is None else _stored(codes)
        if codes is None or tensor is None or len(tensor.shape) < 2:
            continue
        times[codes] = times.get(codes, 0) + 1
        if times[codes] == 1:
            continue
        name = f"{codes.name}/Reshape_{times[codes]}"
        shape = np.array(tensor.shape, np.int64)
        made = ir.node("Reshape", [codes, add_initializer(model, f"{name}_shape", shape)])
        made.outputs[0].name = name
        model.graph.insert_before(node, [made])
        node.replace_input_with(0, made.outputs[0])


def _stored(codes: ir.Value) -> ir.TensorProtocol | None:
    """The tensor behind INT8 codes and the arithmetic of their packing; None where there is none."""
    tensor = codes.const_value
    if codes.producer() is None and (tensor is None or tensor.dtype != ir.DataType.INT8):
        return None
    while (maker := codes.producer()) is not None:
        source = maker.inputs[0] if maker.op_type in _PACKING else None
        if source is None:
            return None
        codes = source
    return codes.const_value
