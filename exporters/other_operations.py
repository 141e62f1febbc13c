"""Operations of torch that neither ONNX nor torch's exporter has, in those of ONNX.

A running result takes as many steps as the length has binary digits: step n joins each value with the one 2^n before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from sqakd_fx.exporters.symbolic import Value, constant


def _whole(values: Any) -> Value:
    return constant(values, np.int64)


def _running(join: Callable[..., Value], x: Value, neutral: Value, axis: int, length: int) -> Value:
    """`join` of every value with all before it along an axis."""
    step = 1
    while step < length:
        kept = op.Slice(x, _whole([0]), _whole([length - step]), _whole([axis]))
        x = join(x, op.Pad(kept, _whole([step, 0]), neutral, _whole([axis])))
        step *= 2
    return x


def _axis(x: Value, dim: int) -> tuple[int, int]:
    """The axis from the front, and its length."""
    axis = dim % len(x.shape)
    return axis, int(x.shape[axis])


def _running_product(self: Value, dim: int, *, dtype: Any = None) -> Value:
    axis, length = _axis(self, dim)
    return _running(op.Mul, self, op.CastLike(_whole(1), self), axis, length)


def _running_extreme(join: Callable[..., Value], neutral: float) -> Callable[..., Any]:
    def translated(self: Value, dim: int) -> tuple[Value, Value]:
        axis, length = _axis(self, dim)
        values = _running(join, self, constant(neutral, np.float32), axis, length)
        behind = [1] * (len(self.shape) - axis - 1)
        places = _whole(np.arange(length).reshape(-1, *behind))
        reached = op.Where(op.Equal(self, values), places, _whole(-1))
        return values, _running(op.Max, reached, _whole(-1), axis, length)

    return translated


def _kth_value(self: Value, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    axis, _ = _axis(self, dim)
    values, places = op.TopK(self, _whole([k]), axis=axis, largest=0)
    last = _whole([k - 1] if keepdim else k - 1)
    return op.Gather(values, last, axis=axis), op.Gather(places, last, axis=axis)


def _median(self: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    _, length = _axis(self, dim)
    return _kth_value(self, (length + 1) // 2, dim, keepdim)


def _hypot(self: Value, other: Value) -> Value:
    return op.Sqrt(op.Add(op.Mul(self, self), op.Mul(other, other)))


def _copysign(self: Value, other: Value) -> Value:
    size = op.Abs(self)
    below = op.Or(op.Less(other, _zero(other)), op.Less(op.Reciprocal(other), _zero(other)))
    return op.Where(below, op.Neg(size), size)  # 1 / -0 is -infinity


def _zero(like: Value) -> Value:
    return op.CastLike(_whole(0), like)


def _is_in(
    elements: Value, test_elements: Value, *, assume_unique: bool = False, invert: bool = False
) -> Value:
    known = op.Reshape(test_elements, _whole([-1]))
    equal = op.Cast(op.Equal(op.Unsqueeze(elements, _whole([-1])), known), to=ir.DataType.INT32)
    found = op.Cast(op.ReduceMax(equal, _whole([-1]), keepdims=0), to=ir.DataType.BOOL)
    return op.Not(found) if invert else found


def _stacked(axis: int, least: int) -> Callable[..., Any]:
    """Concat along an axis of tensors that get axes of size 1 in front and behind, up to `least`, as in numpy."""

    def translated(tensors: Sequence[Value]) -> Value:
        parts = []
        for x in tensors:
            rank = len(x.shape)
            front = [0] if rank < 2 <= least and axis != 1 else []
            behind = range(rank + len(front), least)
            new = [*front, *behind]
            parts.append(op.Unsqueeze(x, _whole(new)) if new else x)
        along = min(axis, max(len(tensors[0].shape), least) - 1)
        return op.Concat(*parts, axis=along)

    return translated


OTHER_OPERATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cumprod.default: _running_product,
    torch.ops.aten.cummax.default: _running_extreme(op.Max, float("-inf")),
    torch.ops.aten.cummin.default: _running_extreme(op.Min, float("inf")),
    torch.ops.aten.kthvalue.default: _kth_value,
    torch.ops.aten.median.dim: _median,
    torch.ops.aten.hstack.default: _stacked(axis=1, least=1),
    torch.ops.aten.vstack.default: _stacked(axis=0, least=2),
    torch.ops.aten.dstack.default: _stacked(axis=2, least=3),
    torch.ops.aten.column_stack.default: _stacked(axis=1, least=2),
    torch.ops.aten.hypot.default: _hypot,
    torch.ops.aten.copysign.Tensor: _copysign,
    torch.ops.aten.isin.Tensor_Tensor: _is_in,
}
