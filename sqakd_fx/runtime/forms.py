"""The forms in which exported models hold one operation, each as a model of that operation alone.

    x → QuantizeLinear → DequantizeLinear → operator → QuantizeLinear → DequantizeLinear → y

with a stored weight where the operator has one; what only moves codes stands between QuantizeLinear and
DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET_OF_INT2 = 25
_OPSET = 21
_TYPES = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}


@dataclass(frozen=True, eq=False)
class Form:
    """An operator between quantized tensors.

    Attributes:
        name: what the form is, in words.
        operator: the ONNX operator.
        shapes: of the activations that it reads.
        weight: shape of its weight, () where it has none.
        bits: of the stored weight codes.
        casts: codes go through a Cast to INT8 before DequantizeLinear reads them.
        per_channel: the weight has a scale for each output channel.
        constants: further inputs, behind activations and weight.
        attributes: of the operator.
        on_codes: the operator works on codes.
        clip: codes of the output are bounded below 8 bits.
    """

    name: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    weight: tuple[int, ...] = ()
    bits: int = 8
    casts: bool = False
    per_channel: bool = True
    constants: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    on_codes: bool = False
    clip: bool = False


_IMAGE, _ROWS = (1, 4, 6, 6), (2, 8)
_TOKENS = (2, 4, 8)


def _stored_forms(operator: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> list[Form]:
    """Every way of storing the weight of a layer."""
    attributes = {"transB": 1} if operator == "Gemm" else {}
    return [
        Form(f"{operator}, {how}", operator, (shape,), weight, bits, casts, attributes=attributes)
        for how, bits, casts in (
            ("INT8 weight", 8, False),
            ("INT4 weight, Cast", 4, True),
            ("INT2 weight, Cast", 2, True),
            ("INT4 weight", 4, False),
            ("INT2 weight", 2, False),
        )
    ]


_CONV = _stored_forms("Conv", _IMAGE, (4, 4, 1, 1))
_GEMM = _stored_forms("Gemm", _ROWS, (4, 8))
INT8, INT4_CAST, INT2_CAST, INT4_DIRECT, INT2_DIRECT = _CONV

PLAIN = Form("Relu", "Relu", (_ROWS,))

FORMS: tuple[Form, ...] = (
    *_CONV,
    Form("Conv, one scale for all channels", "Conv", (_IMAGE,), (4, 4, 1, 1), per_channel=False),
    Form("Conv, Clip below 8 bits", "Conv", (_IMAGE,), (4, 4, 1, 1), clip=True),
    Form("Conv, depthwise", "Conv", (_IMAGE,), (4, 1, 3, 3), attributes={"group": 4}),
    Form("Conv, dilated", "Conv", (_IMAGE,), (4, 4, 3, 3), attributes={"dilations": [2, 2]}),
    Form("Conv, 1-D", "Conv", ((1, 4, 6),), (4, 4, 3)),
    Form("Conv, 3-D", "Conv", ((1, 4, 4, 4, 4),), (4, 4, 3, 3, 3)),
    Form("ConvTranspose", "ConvTranspose", (_IMAGE,), (4, 4, 2, 2), per_channel=False),
    *_GEMM,
    Form("MatMul of two activations", "MatMul", (_TOKENS, (2, 8, 4))),
    Form("Add", "Add", (_IMAGE, _IMAGE)),
    Form("Add, Clip below 8 bits", "Add", (_IMAGE, _IMAGE), clip=True),
    Form("Sub", "Sub", (_IMAGE, _IMAGE)),
    Form("Mul", "Mul", (_IMAGE, _IMAGE)),
    Form("GlobalAveragePool", "GlobalAveragePool", (_IMAGE,)),
    Form("AveragePool", "AveragePool", (_IMAGE,), attributes={"kernel_shape": [2, 2]}),
    Form("ReduceMean", "ReduceMean", (_IMAGE,), constants=(np.array([2, 3]),)),
    Form("Sigmoid", "Sigmoid", (_ROWS,)),
    Form("Softmax", "Softmax", (_ROWS,)),
    Form("LeakyRelu", "LeakyRelu", (_ROWS,)),
    PLAIN,
    Form("Tanh", "Tanh", (_ROWS,)),
    Form("HardSigmoid", "HardSigmoid", (_ROWS,)),
    Form("HardSwish", "HardSwish", (_ROWS,)),
    Form("Gelu", "Gelu", (_ROWS,)),
    Form(
        "LayerNormalization", "LayerNormalization", (_ROWS,), constants=(np.ones(8, np.float32),)
    ),
    *(
        Form(f"{operator} of codes", operator, shapes, (), 8, False, False, constants, attributes, True)
        for operator, shapes, constants, attributes in (
            ("MaxPool", (_IMAGE,), (), {"kernel_shape": [2, 2]}),
            ("Concat", (_IMAGE, _IMAGE), (), {"axis": 1}),
            ("Clip", (_IMAGE,), (np.uint8(0), np.uint8(3)), {}),
            ("Reshape", (_IMAGE,), (np.array([1, -1]),), {}),
            ("Transpose", (_IMAGE,), (), {"perm": [0, 2, 3, 1]}),
            ("Slice", (_IMAGE,), (np.array([1]), np.array([3]), np.array([1])), {}),
            ("Gather", (_IMAGE,), (np.array([0, 2]),), {"axis": 1}),
            ("Pad", (_IMAGE,), (np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.uint8(7)), {}),
            ("Max", (_IMAGE, _IMAGE), (), {}),
        )
    ),
    Form(
        "Resize of codes",
        "Resize",
        (_IMAGE,),
        constants=(None, np.array([1, 1, 2, 2], np.float32)),
        attributes={"mode": "nearest", "coordinate_transformation_mode": "asymmetric"},
        on_codes=True,
    ),
)  # fmt: skip


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


def model_of(form: Form) -> ir.Model:
    """The form as a model of its own, with float inputs and one float output."""
    return _Builder().build(form)


class _Builder:
    """Collects the nodes and stored tensors of one model."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.stored: list[ir.Value] = []
        self.scale = self.constant(np.float32(0.5))
        self.zero = self.constant(np.uint8(7))

    def build(self, form: Form) -> ir.Model:
        kind = ir.TensorType(ir.DataType.FLOAT)
        given = [ir.Input(f"x{i}", ir.Shape(shape), kind) for i, shape in enumerate(form.shapes)]
        read: list[ir.Value | None] = [self.codes(x) for x in given]
        if not form.on_codes:
            read = [self.real(x) for x in read if x is not None]
        if form.weight:
            read.append(self.weight(form))
        read += [None if x is None else self.constant(x) for x in form.constants]
        y = self.then(form.operator, *read, **form.attributes)
        y = y if form.on_codes else self.codes(y)
        if form.clip:
            y = self.then("Clip", y, self.constant(np.uint8(0)), self.constant(np.uint8(15)))
        y = self.real(y)
        y.name, y.type = "y", kind
        small = form.bits == 2
        graph = ir.Graph(
            given,
            [y],
            nodes=self.nodes,
            initializers=self.stored,
            opset_imports={"": OPSET_OF_INT2 if small else _OPSET},
            name="form",
        )
        return ir.Model(graph, ir_version=13 if small else 10)

    def then(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes=attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def codes(self, value: ir.Value) -> ir.Value:
        return self.then("QuantizeLinear", value, self.scale, self.zero)

    def real(self, codes: ir.Value) -> ir.Value:
        return self.then("DequantizeLinear", codes, self.scale, self.zero)

    def weight(self, form: Form) -> ir.Value:
        tensor = stored_codes(np.ones(form.weight, np.int8), form.bits, "w")
        codes = self.value(tensor)
        if form.casts:
            codes = self.then("Cast", codes, to=int(ir.DataType.INT8))
        channels = (form.weight[0],) if form.per_channel else ()
        scale = self.constant(np.full(channels, 0.5, np.float32))
        zero = (
            [] if form.bits < 8 and not form.casts else [self.constant(np.zeros(channels, np.int8))]
        )
        return self.then(
            "DequantizeLinear", codes, scale, *zero, **({"axis": 0} if channels else {})
        )

    def constant(self, array: Any) -> ir.Value:
        return self.value(ir.tensor(np.asarray(array), name=f"c{len(self.stored)}"))

    def value(self, tensor: ir.TensorProtocol) -> ir.Value:
        made = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.numpy().shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.stored.append(made)
        return made
