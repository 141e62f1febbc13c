"""ONNX with int8 containers: QuantizeLinear / DequantizeLinear around float operators.

Every quantized tensor is uint8 (activations) or int8 (weights), biases are int32. Below 8 bits an
integer Clip stands behind QuantizeLinear. ONNX Runtime fuses this form into integer kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_slice_scatter

import sqakd_fx.ir.top_k  # noqa: F401  (registers torch.ops.sqakd_fx, as integer_ops does)
from sqakd_fx.exporters.group_norm import GROUP_NORM
from sqakd_fx.exporters.other_operations import OTHER_OPERATIONS
from sqakd_fx.exporters.symbolic import Value
from sqakd_fx.exporters.uneven_pools import adaptive_average_pool
from sqakd_fx.ir.integer_ops import sides
from sqakd_fx.ir.op_table import Kind, Op

_OPS = torch.ops.sqakd_fx
_LAST = sys.maxsize
"""The end of a slice that goes to the end of its axis."""


def _byte(value: int) -> Value:
    return op.Constant(value=ir.tensor(np.array(value, dtype=np.uint8)))


def _shape(values: Sequence[int]) -> Value:
    return op.Constant(value=ir.tensor(np.array(values, dtype=np.int64)))


def _clip(codes: Value, qmin: int, qmax: int) -> Value:
    return codes if (qmin, qmax) == (0, 255) else op.Clip(codes, _byte(qmin), _byte(qmax))


def _quantize(x: Value, scale: Value, zero_point: Value, qmin: int, qmax: int) -> Value:
    return _clip(op.QuantizeLinear(x, scale, zero_point), qmin, qmax)


def _dequantize(codes: Value, scale: Value, zero_point: Value) -> Value:
    return op.DequantizeLinear(codes, scale, zero_point)


def _dequantized_constant(codes: Value, scale: Value, axis: int, kind: type[np.generic]) -> Value:
    """Weights, and biases of a Gemm, which ONNX Runtime fuses only where their zero points are spelt out."""
    shape = tuple(int(size) for size in scale.shape)
    zero_point = op.Constant(value=ir.tensor(np.zeros(shape, dtype=kind)))
    if not shape:
        return op.DequantizeLinear(codes, scale, zero_point)
    return op.DequantizeLinear(codes, scale, zero_point, axis=axis)


def _dequantized_weight(weight: Value, weight_scale: Value, axis: int) -> Value:
    return _dequantized_constant(weight, weight_scale, axis, np.int8)


def _dequantized_bias(bias: Value, accumulator_scale: Value) -> Value:
    return _dequantized_constant(bias, accumulator_scale, 0, np.int32)


def _pads(padding: Sequence[int], axes: int) -> list[int]:
    """At the start of each axis, then at its end."""
    starts, ends = sides(padding, axes)
    return [*starts, *ends]


def _conv(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    weight: Value,
    weight_scale: Value,
    accumulator_scale: Value,
    bias: Value,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Value:
    inputs = [
        op.DequantizeLinear(x, x_scale, x_zero_point),
        _dequantized_weight(weight, weight_scale, 0),
    ]
    if bias is not None:
        axis = {"axis": 0} if accumulator_scale.shape else {}
        inputs.append(op.DequantizeLinear(bias, accumulator_scale, **axis))
    return op.Conv(
        *inputs,
        kernel_shape=list(weight.shape)[2:],
        strides=stride,
        pads=_pads(padding, len(weight.shape) - 2),
        dilations=dilation,
        group=groups,
    )


def _linear(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    weight: Value,
    weight_scale: Value,
    accumulator_scale: Value,
    bias: Value,
) -> Value:
    """Gemm: the lowering hands over two dimensions."""
    inputs = [
        op.DequantizeLinear(x, x_scale, x_zero_point),
        _dequantized_weight(weight, weight_scale, 0),
    ]
    if bias is not None:
        inputs.append(_dequantized_bias(bias, accumulator_scale))
    return op.Gemm(*inputs, transB=1)


def _matmul(
    a: Value, a_scale: Value, a_zero_point: Value, b: Value, b_scale: Value, b_zero_point: Value
) -> Value:
    return op.MatMul(
        op.DequantizeLinear(a, a_scale, a_zero_point), op.DequantizeLinear(b, b_scale, b_zero_point)
    )


def _dequantize_weight(weight: Any, weight_scale: Any, axis: int) -> Any:
    """Folded when a session starts; behind a DequantizeLinear the runtime would round the activations (MatMulNBits)."""
    codes = op.Cast(weight, to=int(ir.DataType.FLOAT))
    if weight_scale.shape:
        sizes = [-1 if index == axis else 1 for index in range(len(weight.shape))]
        weight_scale = op.Reshape(weight_scale, _shape(sizes))
    return op.Mul(codes, weight_scale)


def _look_up(indices: Any, codes: Any, scale: Any) -> Any:
    """Only the rows that are read become float: the file and the memory hold the table in bytes."""
    rows = op.Cast(op.Gather(codes, indices, axis=0), to=int(ir.DataType.FLOAT))
    return op.Mul(rows, op.Unsqueeze(op.Gather(scale, indices, axis=0), _shape([-1])))


def _requantize(
    accumulator: Value,
    accumulator_scale: Value,
    axis: int,
    scale: Value,
    zero_point: Value,
    qmin: int,
    qmax: int,
) -> Value:
    return _quantize(accumulator, scale, zero_point, qmin, qmax)


def _dequantize_accumulator(accumulator: Value, accumulator_scale: Value, axis: int) -> Value:
    return op.Identity(accumulator)


def _arithmetic(function: Callable[..., Value]) -> Callable[..., Value]:
    def translate(
        a: Value,
        a_scale: Value,
        a_zero_point: Value,
        b: Value,
        b_scale: Value,
        b_zero_point: Value,
        scale: Value,
        zero_point: Value,
        qmin: int,
        qmax: int,
    ) -> Value:
        y = function(
            op.DequantizeLinear(a, a_scale, a_zero_point),
            op.DequantizeLinear(b, b_scale, b_zero_point),
        )
        return _quantize(y, scale, zero_point, qmin, qmax)

    return translate


def _global_average_pool(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    scale: Value,
    zero_point: Value,
    qmin: int,
    qmax: int,
) -> Value:
    y = op.GlobalAveragePool(op.DequantizeLinear(x, x_scale, x_zero_point))
    return _quantize(y, scale, zero_point, qmin, qmax)


def _average_pool(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    scale: Value,
    zero_point: Value,
    qmin: int,
    qmax: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    end_padding: Sequence[int],
    count_include_pad: bool,
) -> Value:
    y = op.AveragePool(
        op.DequantizeLinear(x, x_scale, x_zero_point),
        kernel_shape=kernel,
        strides=stride,
        pads=[*padding, *end_padding],
        count_include_pad=int(count_include_pad),
    )
    return _quantize(y, scale, zero_point, qmin, qmax)


def _top_k(x: Value, k: int, dim: int, largest: bool) -> Value:
    return op.TopK(x, _shape([k]), axis=dim, largest=int(largest))


def _stable_sort(x: Value, *, stable: bool, dim: int = -1, descending: bool = False) -> Value:
    """TopK of all: of equals the first comes first. torch's own table has no stable sort."""
    size = op.Gather(op.Shape(x), _shape([dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending))


def _slice_scatter(
    self: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """The source between what stands before and behind the slice.

    torch 2.8 matches arguments by name, and leaves bounds at the ends of the axis out.
    """
    start = 0 if start is None else start
    end = _LAST if end is None else end
    ordered = isinstance(start, int) and isinstance(end, int) and 0 <= start < end
    if step != 1 or not ordered:
        return aten_slice_scatter(self, src, dim, start, end, step)
    parts = [src]
    if start > 0:
        parts.insert(0, op.Slice(self, _shape([0]), _shape([start]), _shape([dim])))
    if end < _LAST:
        parts.append(op.Slice(self, _shape([end]), _shape([_LAST]), _shape([dim])))
    return op.Concat(*parts, axis=dim) if len(parts) > 1 else src


_ADAPTIVE_AVERAGE_POOLS = (
    torch.ops.aten.adaptive_avg_pool1d.default,
    torch.ops.aten.adaptive_avg_pool2d.default,
    torch.ops.aten.adaptive_avg_pool3d.default,
)

TRANSLATIONS: dict[Any, Callable[..., Value]] = {
    _OPS.quantize.default: _quantize,
    _OPS.dequantize.default: _dequantize,
    _OPS.clip.default: _clip,
    _OPS.conv.default: _conv,
    _OPS.linear.default: _linear,
    _OPS.matmul.default: _matmul,
    _OPS.dequantize_weight.default: _dequantize_weight,
    _OPS.look_up.default: _look_up,
    _OPS.requantize.default: _requantize,
    _OPS.dequantize_accumulator.default: _dequantize_accumulator,
    _OPS.add.default: _arithmetic(op.Add),
    _OPS.sub.default: _arithmetic(op.Sub),
    _OPS.mul.default: _arithmetic(op.Mul),
    _OPS.global_average_pool.default: _global_average_pool,
    _OPS.average_pool.default: _average_pool,
    _OPS.top_k.default: _top_k,
    torch.ops.aten.sort.stable: _stable_sort,
    torch.ops.aten.slice_scatter.default: _slice_scatter,
    **OTHER_OPERATIONS,
    **GROUP_NORM,
    **dict.fromkeys(_ADAPTIVE_AVERAGE_POOLS, adaptive_average_pool),
}

QUANTIZER_FORM = "QuantizeLinear, then below 8 bits a Clip on the codes"
"""What a quantizer of activations becomes in this profile, in words."""


def onnx_form(op: Op, *, integer: bool) -> str:
    """What an operation of the op table becomes in this profile, in words."""
    if op.looks_up and integer:
        return "Gather of INT8 codes and of the rows' scales, then Cast and Mul"
    if not integer:
        return "the float operator, between DequantizeLinear and QuantizeLinear where those stand"
    if op.kind is Kind.BATCH_NORM:
        return "a depthwise 1×1 Conv between DequantizeLinear and QuantizeLinear"
    if op.transposed:
        return "a Conv with one output channel for each phase, then Reshape and Transpose of codes"
    form = "DequantizeLinear, the float operator, QuantizeLinear"
    return f"{form}; ONNX Runtime fuses them to {op.fused}" if op.fused else f"{form}, not fused"
