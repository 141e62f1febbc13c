"""Where ONNX Runtime would compute otherwise than the model says, or in float for no need: avoided."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sqakd_fx.exporters.codes_as_floats import CARRIED, is_read_from_codes
from sqakd_fx.exporters.packed import add_initializer

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_CLIPS = ("Relu", "Clip")


def prevent_rewrites(model: ir.Model) -> None:
    """In place; the function stays the same, bit for bit."""
    _keep_pads_apart(model)
    _keep_weights_in_float(model)
    _keep_products_in_integers(model)


def _keep_pads_apart(model: ir.Model) -> None:
    """Pads name their axes where a pool counts windows with `ceil_mode`.

    The runtime would fuse the two, and a pool leaves out a last window that begins in its own padding.
    """
    if not any(node.attributes.get_int("ceil_mode", 0) for node in model.graph):
        return
    axes: dict[int, ir.Value] = {}
    for node in model.graph:
        pads = node.inputs[1].const_value if node.op_type == "Pad" and node.inputs[1] else None
        if pads is None or len(node.inputs) > 3:
            continue
        rank = pads.size // 2
        if rank not in axes:
            every = np.arange(rank, dtype=np.int64)
            axes[rank] = add_initializer(model, f"constant.axes_{rank}", every)
        node.resize_inputs(4)
        node.replace_input_with(3, axes[rank])


def _keep_weights_in_float(model: ir.Model) -> None:
    """A layer with a float weight reads codes through a Sum of one.

    Between DequantizeLinear and QuantizeLinear the runtime would give it INT8 weights of its own making.
    """
    apart: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type not in _LAYERS or node.domain:
            continue
        x, weight = node.inputs[:2]
        if x is None or not _is_dequantized(x) or weight is None or is_read_from_codes(weight):
            continue
        if x not in apart:
            apart[x] = _sum_of_one(model, x, node)
        node.replace_input_with(0, apart[x])


def _keep_products_in_integers(model: ir.Model) -> None:
    """A clip reads a product of codes through a Sum of one where no QuantizeLinear is behind it.

    The runtime would look for one, find none, and multiply in float.
    """
    for node in list(model.graph):
        value = node.inputs[0] if node.op_type in _CLIPS else None
        made = None if value is None else value.producer()
        if value is None or made is None or made.op_type not in ("Gemm", "MatMul"):
            continue
        readers = {use.node.op_type for use in node.outputs[0].uses()}
        if readers != {"QuantizeLinear"} and is_read_from_codes(made.inputs[1]):
            node.replace_input_with(0, _sum_of_one(model, value, node))


def _sum_of_one(model: ir.Model, value: ir.Value, reader: ir.Node) -> ir.Value:
    """The value itself, as an operation that the runtime neither removes nor looks through."""
    node = ir.node("Sum", [value])
    model.graph.insert_before(reader, [node])
    (same,) = node.outputs
    same.type, same.shape = value.type, value.shape
    return same


def _moves(node: ir.Node) -> bool:
    return node.op_type in CARRIED and node.op_type != "Clip"


def _is_dequantized(value: ir.Value) -> bool:
    """Whether a value is read from codes, as it is or moved."""
    made = value.producer()
    while made is not None and _moves(made) and made.inputs[0] is not None:
        value = made.inputs[0]
        made = value.producer()
    return is_read_from_codes(value)
