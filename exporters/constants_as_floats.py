"""Quantized tensors that no input changes, as the floats that they stand for.

    Before:  QuantizeLinear (constant) → DequantizeLinear → Mul
    After:   Mul with a stored float

OpenVINO 2026.4 fails where a quantized activation is multiplied by a quantized constant of two axes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from sqakd_fx.exporters.packed import add_initializer

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomUniform")


def constants_to_floats(model: ir.Model) -> None:
    """In place; a QuantizeLinear stays, without readers, as what validation compares."""
    constant = set(model.graph.initializers.values())
    made: list[ir.Node] = []
    for node in model.graph:
        if all(x is None or x in constant for x in node.inputs) and node.op_type not in _RANDOM:
            constant.update(node.outputs)
            made.append(node)
    readers = [node for node in made if _reads_activation_codes(node)]
    for node, floats in zip(readers, _computed(model, made, readers), strict=True):
        stored = add_initializer(model, f"{node.outputs[0].name}_float", floats)
        ir.convenience.replace_all_uses_with(node.outputs[0], stored, replace_graph_outputs=False)


def _reads_activation_codes(node: ir.Node) -> bool:
    reads_codes = node.op_type == "DequantizeLinear" and len(node.inputs) > 2
    zero_point = node.inputs[2] if reads_codes else None
    is_output = any(value.is_graph_output() for value in node.outputs)
    return zero_point is not None and zero_point.dtype == ir.DataType.UINT8 and not is_output


def _computed(model: ir.Model, made: list[ir.Node], readers: list[ir.Node]) -> list[np.ndarray]:
    """What nodes that no input reaches give at `readers`."""
    if not readers:
        return []
    proto = ir.serde.serialize_model(model)
    names = {name for node in made for name in (value.name for value in node.outputs)}
    kept = [node for node in proto.graph.node if set(node.output) & names]
    del proto.graph.node[:], proto.graph.input[:], proto.graph.output[:]
    proto.graph.node.extend(kept)
    proto.graph.output.extend(ir.serde.serialize_value(reader.outputs[0]) for reader in readers)
    found: list[np.ndarray] = ReferenceEvaluator(proto).run(None, {})  # type: ignore[assignment]
    return found
