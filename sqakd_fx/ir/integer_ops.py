"""Operations of the integer program, as torch custom ops that compute in true integer arithmetic.

Codes are uint8, weight codes int8, accumulators and biases int32. Scales are float32 tensors, and a
requantization multiplies by a float32 and rounds half to even, as ONNX Runtime's kernels do. The
same ops carry the scales that an exporter needs, so a lowered graph can be run or written alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_EXACT_IN_FLOAT32 = 2**24


def _channels(vector: Tensor, axis: int, ndim: int) -> Tensor:
    if vector.ndim == 0:
        return vector
    shape = [1] * ndim
    shape[axis] = -1
    return vector.reshape(shape)


def _saturate(rounded: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return (rounded + zero_point.to(rounded.dtype)).clamp(qmin, qmax).to(torch.uint8)


def _exact_type(weight: Tensor, zero_point: Tensor) -> torch.dtype:
    """float32 where every partial sum over an output channel (axis 0) stays exact in it, else float64."""
    if weight.is_cuda:
        return torch.float64
    rows = weight.reshape(len(weight), -1)
    below, above = int(zero_point), 255 - int(zero_point)
    plus, minus = (rows.clamp(*sign).sum(1, dtype=torch.int64) for sign in ((0, 127), (-128, 0)))
    largest = torch.maximum(above * plus - below * minus, below * plus - above * minus).amax()
    return torch.float32 if int(largest) < _EXACT_IN_FLOAT32 else torch.float64


@torch.library.custom_op("sqakd_fx::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """ONNX QuantizeLinear, then an integer clip: float32 to uint8 codes."""
    return _saturate(torch.round(x / scale), zero_point, qmin, qmax)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("sqakd_fx::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """ONNX DequantizeLinear: uint8 codes to float32."""
    return (codes.to(torch.float32) - zero_point.to(torch.float32)) * scale


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("sqakd_fx::clip", mutates_args=())
def clip(codes: Tensor, qmin: int, qmax: int) -> Tensor:
    """ONNX Clip of uint8 codes."""
    return codes.clamp(qmin, qmax)


@clip.register_fake
def _(codes: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(codes)


@torch.library.custom_op("sqakd_fx::conv", mutates_args=())
def conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    accumulator_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """int32 accumulator of a convolution in 1 to 3 dimensions: uint8 codes, int8 weight codes.

    `padding` has a size for each axis, or one for the start and then one for the end of each.
    """
    kind = _exact_type(weight, x_zero_point)
    function = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    shifted = x.to(kind) - x_zero_point.to(kind)
    starts, ends = sides(padding, weight.ndim - 2)
    if starts != ends:
        shifted, starts = F.pad(shifted, both_ends(starts, ends)), [0] * len(starts)
    total = function(shifted, weight.to(kind), None, stride, starts, dilation, groups)
    return _with_bias(total, bias, 1)


@conv.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    x_scale,
    x_zero_point,
    weight,
    weight_scale,
    accumulator_scale,
    bias,
    stride,
    padding,
    dilation,
    groups,
):
    pads = sides(padding, weight.ndim - 2)
    reach = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    sizes = [
        (size + start + end - far - 1) // step + 1
        for size, start, end, far, step in zip(x.shape[2:], *pads, reach, stride, strict=True)
    ]
    return x.new_empty((x.shape[0], weight.shape[0], *sizes), dtype=torch.int32)


def sides(padding: Sequence[int], axes: int) -> tuple[list[int], list[int]]:
    """The padding at the start and at the end of each axis."""
    return list(padding[:axes]), list(padding[-axes:])


def _with_bias(total: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    total = total.to(torch.int32)
    return total if bias is None else total + _channels(bias, axis, total.ndim)


@torch.library.custom_op("sqakd_fx::linear", mutates_args=())
def linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    accumulator_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """int32 accumulator of x Wᵀ + b: codes (..., in), weight codes (out, in)."""
    kind = _exact_type(weight, x_zero_point)
    total = F.linear(x.to(kind) - x_zero_point.to(kind), weight.to(kind))
    return _with_bias(total, bias, -1)


@linear.register_fake
def _(x, x_scale, x_zero_point, weight, weight_scale, accumulator_scale, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.int32)


@torch.library.custom_op("sqakd_fx::matmul", mutates_args=())
def matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
) -> Tensor:
    """int32 accumulator of a product of two activations, broadcast like torch.matmul."""
    exact = a.shape[-1] * 255**2 < _EXACT_IN_FLOAT32 and not a.is_cuda
    kind = torch.float32 if exact else torch.float64
    left, right = a.to(kind) - a_zero_point.to(kind), b.to(kind) - b_zero_point.to(kind)
    return torch.matmul(left, right).to(torch.int32)


@matmul.register_fake
def _(a, a_scale, a_zero_point, b, b_scale, b_zero_point):  # type: ignore[no-untyped-def]
    if a.ndim == b.ndim and a.shape[:-2] == b.shape[:-2]:
        return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.int32)
    return torch.empty_like(torch.matmul(a.float(), b.float()), dtype=torch.int32)


@torch.library.custom_op("sqakd_fx::dequantize_weight", mutates_args=())
def dequantize_weight(weight: Tensor, weight_scale: Tensor, axis: int) -> Tensor:
    """INT8 codes of a weight in float32; a scale for each index of an axis, or one."""
    return weight.to(torch.float32) * _channels(weight_scale, axis, weight.ndim)


@dequantize_weight.register_fake
def _(weight, weight_scale, axis):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight, dtype=torch.float32)


@torch.library.custom_op("sqakd_fx::look_up", mutates_args=())
def look_up(indices: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Rows of a table in float32: INT8 codes (rows, ...) with a scale for each row."""
    return codes[indices].to(torch.float32) * scale[indices][..., None]


@look_up.register_fake
def _(indices, codes, scale):  # type: ignore[no-untyped-def]
    return scale.new_empty((*indices.shape, codes.shape[1]))


@torch.library.custom_op("sqakd_fx::requantize", mutates_args=())
def requantize(
    accumulator: Tensor,
    accumulator_scale: Tensor,
    axis: int,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    """int32 accumulator to uint8 codes: float32 multiplier, round half to even, integer clip."""
    multiplier = _channels(accumulator_scale / scale, axis, accumulator.ndim)
    scaled = accumulator.to(torch.float32) * multiplier
    return _saturate(torch.round(scaled), zero_point, qmin, qmax)


@requantize.register_fake
def _(accumulator, accumulator_scale, axis, scale, zero_point, qmin, qmax):  # type: ignore[no-untyped-def]
    return torch.empty_like(accumulator, dtype=torch.uint8)


@torch.library.custom_op("sqakd_fx::dequantize_accumulator", mutates_args=())
def dequantize_accumulator(accumulator: Tensor, accumulator_scale: Tensor, axis: int) -> Tensor:
    """int32 accumulator to float32."""
    return accumulator.to(torch.float32) * _channels(accumulator_scale, axis, accumulator.ndim)


@dequantize_accumulator.register_fake
def _(accumulator, accumulator_scale, axis):  # type: ignore[no-untyped-def]
    return torch.empty_like(accumulator, dtype=torch.float32)


def _float_rule(function):  # type: ignore[no-untyped-def]
    """QuantizeLinear(function(DequantizeLinear(a), DequantizeLinear(b)))."""

    def rule(  # type: ignore[no-untyped-def]
        a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point
    ):
        left = (a.to(torch.float32) - a_zero_point.to(torch.float32)) * a_scale
        right = (b.to(torch.float32) - b_zero_point.to(torch.float32)) * b_scale
        return torch.round(function(left, right) / scale) + zero_point.to(torch.float32)

    return rule


def rounded_sum(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> Tensor:
    """The code of a sum, not yet clipped, as a whole number in float32; codes of 8 bits in any dtype.

    As ONNX Runtime's QLinearAdd rounds on x86 with FMA: zero points first, then b, then a. A fused
    multiply-add is a float64 product and sum, rounded once to float32.
    """
    ratio_a, ratio_b = a_scale / scale, b_scale / scale
    shift_b = ratio_b * b_zero_point.to(torch.float32)
    shift = _fused(ratio_a, a_zero_point, shift_b)
    fixed = zero_point.to(torch.float32) - shift
    return torch.round(_fused(ratio_a, a, _fused(ratio_b, b, fixed)))


def _fused(scale: Tensor, codes: Tensor, addend: Tensor) -> Tensor:
    exact = scale.to(torch.float64) * codes.to(torch.float64) + addend.to(torch.float64)
    return exact.to(torch.float32)


def _arithmetic(name: str, rule):  # type: ignore[no-untyped-def]
    """An elementwise op of two coded tensors, requantized at once."""

    @torch.library.custom_op(f"sqakd_fx::{name}", mutates_args=())
    def op(
        a: Tensor,
        a_scale: Tensor,
        a_zero_point: Tensor,
        b: Tensor,
        b_scale: Tensor,
        b_zero_point: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
    ) -> Tensor:
        codes = rule(a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point)
        return codes.clamp(qmin, qmax).to(torch.uint8)  # type: ignore[no-any-return]

    @op.register_fake
    def _(a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point, qmin, qmax):  # type: ignore[no-untyped-def]
        return torch.empty_like(a.float() + b.float(), dtype=torch.uint8)

    return op


add = _arithmetic("add", rounded_sum)
sub = _arithmetic("sub", _float_rule(torch.sub))  # type: ignore[no-untyped-call]
mul = _arithmetic("mul", _float_rule(torch.mul))  # type: ignore[no-untyped-call]


@torch.library.custom_op("sqakd_fx::global_average_pool", mutates_args=())
def global_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Mean over all axes behind the channels, kept with size 1."""
    axes = tuple(range(2, x.ndim))
    count = x[0, 0].numel()
    total = (x.to(torch.int32) - x_zero_point.to(torch.int32)).sum(dim=axes, keepdim=True)
    scaled = total.to(torch.float32) * (x_scale / (scale * count))
    return _saturate(torch.round(scaled), zero_point, qmin, qmax)


@global_average_pool.register_fake
def _(x, x_scale, x_zero_point, scale, zero_point, qmin, qmax):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], x.shape[1], *([1] * (x.ndim - 2))), dtype=torch.uint8)


@torch.library.custom_op("sqakd_fx::average_pool", mutates_args=())
def average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    end_padding: list[int],
    count_include_pad: bool,
) -> Tensor:
    """Average pooling over windows, in 1 to 3 dimensions, padded at each end of each axis."""
    real = (x.to(torch.float32) - x_zero_point.to(torch.float32)) * x_scale
    pads = both_ends(padding, end_padding)
    ones = torch.ones_like(real[:1, :1])
    counted = F.pad(ones, pads, value=float(count_include_pad))
    y = _window_sums(F.pad(real, pads), kernel, stride) / _window_sums(counted, kernel, stride)
    return _saturate(torch.round(y / scale), zero_point, qmin, qmax)


def both_ends(starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Padding as F.pad takes it: the last axis first."""
    return [p for pair in zip(reversed(starts), reversed(ends)) for p in pair]


def _window_sums(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    if len(kernel) == 1:
        return _window_sums(x.unsqueeze(2), [1, *kernel], [1, *stride]).squeeze(2)
    function = F.avg_pool2d if len(kernel) == 2 else F.avg_pool3d
    return function(x, list(kernel), list(stride), divisor_override=1)


@average_pool.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    x_scale,
    x_zero_point,
    scale,
    zero_point,
    qmin,
    qmax,
    kernel,
    stride,
    padding,
    end_padding,
    count_include_pad,
):
    padded = F.pad(x.float(), both_ends(padding, end_padding))
    return torch.empty_like(_window_sums(padded, kernel, stride), dtype=torch.uint8)
