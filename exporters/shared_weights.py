"""Weights and zero points that several layers read are stored once or cost little, and none reads another's tensor.

On processors without 8-bit dot products ONNX Runtime makes unsigned codes of every weight and its zero point
(session.x64quantprecision) and fails where it would make them of one tensor twice. A Reshape to the same shape,
which the runtime folds when it loads the model, tells readers of a weight apart (each of what the last one made:
it merges two of one tensor); zero points are copied.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sqakd_fx.exporters.packed import add_initializer, stored_behind


def read_apart(model: ir.Model) -> None:
    """Give every reader of a weight but the first a name of its own for it, and every weight its own zero point."""
    times: dict[ir.Value, int] = {}
    latest: dict[ir.Value, ir.Value] = {}
    zero_points: set[ir.Value] = set()
    for node in list(model.graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        tensor = None if codes is None else stored_behind(codes).const_value
        if codes is None or tensor is None or len(tensor.shape) < 2:
            continue
        if codes.producer() is None and tensor.dtype != ir.DataType.INT8:
            continue
        times[codes] = times.get(codes, 0) + 1
        stem = f"{codes.name}/{times[codes]}"
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        if zero_point in zero_points and zero_point.const_value is not None:
            copy = add_initializer(model, f"{stem}/zero_point", zero_point.const_value.numpy())
            node.replace_input_with(2, copy)
        elif zero_point is not None:
            zero_points.add(zero_point)
        if times[codes] > 1:
            shape = add_initializer(model, f"{stem}/shape", np.array(tensor.shape, np.int64))
            made = ir.node("Reshape", [latest.get(codes, codes), shape])
            made.outputs[0].name = stem
            model.graph.insert_before(node, [made])
            node.replace_input_with(0, made.outputs[0])
            latest[codes] = made.outputs[0]
