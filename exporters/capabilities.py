"""Which weight forms an ONNX Runtime runs on integer kernels, runs in float, or refuses.

The installed runtime is asked: a convolution of one channel in each form is loaded, and the graph that
the runtime makes of it is read.
"""

from __future__ import annotations

import functools
import tempfile
from enum import Enum
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

OPSET_OF_INT2 = 25


class Form(Enum):
    """How the weight codes of a layer are stored and read."""

    INT8 = "INT8 initializer, DequantizeLinear"
    INT4_CAST = "INT4 initializer, Cast to INT8, DequantizeLinear"
    INT2_CAST = "INT2 initializer, Cast to INT8, DequantizeLinear"
    INT4_DIRECT = "INT4 initializer, DequantizeLinear"
    INT2_DIRECT = "INT2 initializer, DequantizeLinear"


class Support(Enum):
    INTEGER = "runs on integer kernels"
    FLOAT = "runs in float"
    REFUSED = "is refused at load"


_TYPES = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}
_BITS = {
    Form.INT8: 8,
    Form.INT4_CAST: 4,
    Form.INT2_CAST: 2,
    Form.INT4_DIRECT: 4,
    Form.INT2_DIRECT: 2,
}


@functools.cache
def support(form: Form, provider: str = "CPUExecutionProvider") -> Support:
    """What the installed ONNX Runtime does with a form."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        made, optimised = Path(folder) / "form.onnx", Path(folder) / "optimised.onnx"
        ir.save(_convolution(form), made)
        options.optimized_model_filepath = str(optimised)
        try:
            ort.InferenceSession(str(made), options, providers=[provider])
        except Exception:
            return Support.REFUSED
        ran = {node.op_type for node in ir.load(optimised).graph}
    return Support.INTEGER if "QLinearConv" in ran else Support.FLOAT


def stored_codes(codes: np.ndarray, bits: int, name: str | None = None) -> ir.TensorProtocol:
    """Integer codes as an INT2, INT4 or INT8 tensor, two or four to a byte."""
    if bits == 8:
        return ir.tensor(codes.astype(np.int8), name=name)
    each = 8 // bits
    flat = codes.astype(np.int8).reshape(-1) & (2**bits - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % each, np.int8)]).astype(np.uint8)
    rows = flat.reshape(-1, each) << (bits * np.arange(each, dtype=np.uint8))
    packed = np.bitwise_or.reduce(rows, axis=1).astype(np.uint8)
    return ir.PackedTensor(packed, _TYPES[bits], shape=ir.Shape(codes.shape), name=name)


def _convolution(form: Form) -> ir.Model:
    """x → QuantizeLinear → DequantizeLinear → Conv → QuantizeLinear → DequantizeLinear."""
    x = ir.Input("x", ir.Shape([1, 4, 4, 4]), ir.TensorType(ir.DataType.FLOAT))
    bits = _BITS[form]
    codes = np.ones((4, 4, 1, 1), np.int8)
    weight = _stored("w", stored_codes(codes, bits, "w"))
    scale = _stored("s", ir.tensor(np.array(0.5, np.float32), name="s"))
    zero = _stored("z", ir.tensor(np.array(7, np.uint8), name="z"))
    w_scale = _stored("ws", ir.tensor(np.full(4, 0.5, np.float32), name="ws"))
    read = weight
    nodes = []
    if form in (Form.INT4_CAST, Form.INT2_CAST):
        nodes.append(ir.node("Cast", [weight], attributes={"to": int(ir.DataType.INT8)}))
        read = nodes[-1].outputs[0]
    nodes.append(ir.node("DequantizeLinear", [read, w_scale], attributes={"axis": 0}))
    real_weight = nodes[-1].outputs[0]

    def on_grid(value: ir.Value) -> ir.Value:
        nodes.append(ir.node("QuantizeLinear", [value, scale, zero]))
        nodes.append(ir.node("DequantizeLinear", [nodes[-1].outputs[0], scale, zero]))
        return nodes[-1].outputs[0]

    nodes.append(ir.node("Conv", [on_grid(x), real_weight]))
    y = on_grid(nodes[-1].outputs[0])
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph(
        [x],
        [y],
        nodes=nodes,
        initializers=[weight, scale, zero, w_scale],
        opset_imports={"": OPSET_OF_INT2 if bits == 2 else 21},
        name="form",
    )
    return ir.Model(graph, ir_version=13 if bits == 2 else 10)


def _stored(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=name,
        shape=ir.Shape(tensor.numpy().shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
