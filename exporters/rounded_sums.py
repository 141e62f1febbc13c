"""Sums of codes whose rounding OpenVINO keeps.

OpenVINO fuses a convolution, the quantizer behind it, a sum and the quantizer of the sum. It leaves out the first
rounding then. A second pair of QuantizeLinear and DequantizeLinear makes it keep the rounding; the pair changes no
number, and ONNX Runtime removes it when it loads the file. OpenVINO 2026.4 would remove it as well, but leaves it where
both DequantizeLinear read one zero point that nothing else reads.
"""

from __future__ import annotations

import onnx_ir as ir

from sqakd_fx.exporters.codes_as_floats import array_of
from sqakd_fx.exporters.names import names_of
from sqakd_fx.exporters.packed import add_initializer
from sqakd_fx.ir.tensor_names import free_name

_SUM, _LAYER = "Add", "Conv"


def keep_rounding(model: ir.Model) -> None:
    """In place: a second pair between the codes of a convolution and the sum that alone reads them."""
    taken = names_of(model)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and _is_read_by_a_sum(node):
            codes = node.inputs[0]
            if codes is not None and _is_of_a_convolution(codes):
                _repeat(model, codes, node, taken)


def _is_read_by_a_sum(node: ir.Node) -> bool:
    return [reader.op_type for reader in node.outputs[0].consumers()] == [_SUM]


def _is_of_a_convolution(codes: ir.Value) -> bool:
    """Whether one reader has these codes, and a convolution's quantizer makes them, with its Clip or without."""
    made = _single(codes)
    if made is not None and made.op_type == "Clip" and made.inputs[0] is not None:
        made = _single(made.inputs[0])
    if made is None or made.op_type != "QuantizeLinear" or made.inputs[0] is None:
        return False
    layer = made.inputs[0].producer()
    return layer is not None and layer.op_type == _LAYER


def _single(value: ir.Value) -> ir.Node | None:
    """What makes a value that one node reads."""
    return value.producer() if len(list(value.consumers())) == 1 else None


def _repeat(model: ir.Model, codes: ir.Value, reader: ir.Node, taken: set[str]) -> None:
    scale, zero_point = reader.inputs[1:]
    own = add_initializer(model, f"{codes.name}/zero_point", array_of(zero_point))
    floats = ir.node("DequantizeLinear", [codes, scale, own])
    again = ir.node("QuantizeLinear", [floats.outputs[0], scale, zero_point])
    for node, what in ((floats, "float"), (again, "again")):
        node.name = node.outputs[0].name = free_name(f"{codes.name}/{what}", taken)
        taken.add(node.name)
    model.graph.insert_before(reader, [floats, again])
    reader.replace_input_with(0, again.outputs[0])
    reader.replace_input_with(2, own)
