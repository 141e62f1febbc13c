"""Make a packed file small: what a runtime or shape inference finds by itself is not stored.

Left out: shapes and metadata of inner tensors, names of what is neither a layer's weight or bias nor a
quantized activation, attributes that say the default, zero points that are zero, and the scale of a bias.
That scale is the product of two scales that are stored. Biases are stored in INT8 or INT16 where that holds them
(the runtime folds the Mul and the Cast when it loads the model).
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from sqakd_fx.exporters.names import is_marked, values_of
from sqakd_fx.exporters.packed import replace_initializer, stored_behind
from sqakd_fx.ir.tensor_names import free_name

_BYTES_OF_A_CAST = 40
_PLUMBING = ("QuantizeLinear", "DequantizeLinear", "Clip", "Cast", "Mul", "Add")
_USUAL = {"dilations": 1, "strides": 1, "pads": 0}


def slim(model: ir.Model) -> None:
    """Shrink a packed model in place; the function stays the same, bit for bit."""
    for node in list(model.graph):
        if node.op_type == "Conv":
            _drop_usual_geometry(node)
            _drop_zero_point_of_weight(node)
        if node.op_type in ("Conv", "Gemm"):
            _multiply_bias_scale(model, node)
            _narrow_bias(model, node)
    _share_small_constants(model)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
    _forget(model)


def _array(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _drop_usual_geometry(node: ir.Node) -> None:
    node.attributes.pop("kernel_shape", None)  # the weight says it
    for name, usual in _USUAL.items():
        attribute = node.attributes.get(name)
        if attribute is not None and all(x == usual for x in attribute.as_ints()):
            del node.attributes[name]


def _reader(node: ir.Node, index: int) -> ir.Node | None:
    """The DequantizeLinear behind an input."""
    value = node.inputs[index] if index < len(node.inputs) else None
    made = None if value is None else value.producer()
    return made if made is not None and made.op_type == "DequantizeLinear" else None


def _drop_zero_point_of_weight(node: ir.Node) -> None:
    for index in (1, 2):
        made = _reader(node, index)
        if made is not None and len(made.inputs) > 2:
            zero = _array(made.inputs[2])
            if zero is not None and not zero.any():
                made.resize_inputs(2)


def _multiply_bias_scale(model: ir.Model, node: ir.Node) -> None:
    x, weight, bias = (_reader(node, index) for index in range(3))
    if x is None or weight is None or bias is None:
        return
    stored = bias.inputs[1]
    step, weight_step, wanted = _array(x.inputs[1]), _array(weight.inputs[1]), _array(stored)
    if stored is None or wanted is None or step is None or weight_step is None or wanted.size < 2:
        return
    product = np.asarray(step * weight_step, np.float32)
    if product.shape != wanted.shape or not np.array_equal(product, wanted):
        return
    made = ir.node("Mul", [x.inputs[1], weight.inputs[1]])
    name = str(stored.name)
    model.graph.insert_before(bias, [made])
    ir.convenience.replace_all_uses_with(stored, made.outputs[0])
    del model.graph.initializers[name]
    made.outputs[0].name = name


def _narrow_bias(model: ir.Model, node: ir.Node) -> None:
    """INT32 as INT8 or INT16 and a Cast, where that takes fewer bytes."""
    reader = _reader(node, 2)
    stored = None if reader is None else reader.inputs[0]
    bias = _array(stored)
    if reader is None or stored is None or bias is None or len(stored.uses()) != 1:
        return
    for kind in (np.int8, np.int16):
        narrow = bias.astype(kind)
        saved = bias.nbytes - narrow.nbytes - _BYTES_OF_A_CAST
        if saved > 0 and np.array_equal(narrow, bias):
            replace_initializer(model, stored, ir.tensor(narrow, name=stored.name))
            made = ir.node("Cast", [stored], {"to": int(ir.DataType.INT32)})
            model.graph.insert_before(reader, [made])
            reader.replace_input_with(0, made.outputs[0])
            return


def _share_small_constants(model: ir.Model) -> None:
    """One initializer for each number: zero points, scales of activations."""
    seen: dict[tuple[str, bytes], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        array = _array(value)
        if array is None or array.ndim:
            continue
        first = seen.setdefault((str(array.dtype), array.tobytes()), value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del model.graph.initializers[name]


def _forget(model: ir.Model) -> None:
    outer = {*model.graph.inputs, *model.graph.outputs}
    codes = {
        stored_behind(node.inputs[0])
        for node in model.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None
    }
    fixed = {
        str(value.name)
        for value in values_of(model)
        if value in outer or value in codes or is_marked(value)
    }
    inner = model.graph.all_nodes()
    fixed |= {
        str(value.name) for node in inner if node.graph is not model.graph for value in node.outputs
    }
    stored = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for index, value in enumerate(stored):
        value.metadata_props.clear()
        value.type = value.shape = None
        if value not in codes:
            value.name = free_name(f"c{index}", fixed)
        model.graph.initializers[str(value.name)] = value
    count = itertools.count()
    for node in model.graph:
        node.metadata_props.clear()
        if node.op_type in _PLUMBING:
            node.name = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value in outer:
                continue
            value.type = value.shape = None
            if value.name != "" and not is_marked(value):
                value.name = free_name(f"t{next(count)}", fixed)
