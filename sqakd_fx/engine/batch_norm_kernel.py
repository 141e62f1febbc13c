"""BatchNorm in training that keeps all cores busy when compiled.

The compiler's loop for a sum over samples and pixels is parallel over channels in groups of a vector: with
16 channels one core works alone. Summing each sample first is parallel over samples. In symbols, with
x̂ = (x - mean) / sqrt(var + ε) over n values a channel,

    var = mean of the samples' var + var of the samples' mean
    g_x = γ / sqrt(var + ε) · (g - Σg / n - x̂ Σ(g x̂) / n),   g_γ = Σ(g x̂),   g_β = Σg
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sqakd_fx.quant.batch_norm import settled, track


class BatchNormByRows(torch.autograd.Function):
    """(y, mean, variance) of x (N, C, ...) with γ and β of shape (C,); float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_variance, row_mean = torch.var_mean(x, list(range(2, x.ndim)), correction=0)
        spread, mean = torch.var_mean(row_mean, 0, correction=0)
        variance = row_variance.mean(0) + spread
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale = inverse * weight
        y = (x - mean.reshape(shape)) * scale.reshape(shape) + bias.reshape(shape)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        g = gradients[0]
        shape = (1, -1) + (1,) * (x.ndim - 2)
        pixels = list(range(2, x.ndim))
        count = x.numel() // x.shape[1]
        normal = (x - mean.reshape(shape)) * inverse.reshape(shape)
        g_bias = g.sum(pixels).sum(0)
        g_weight = (g * normal).sum(pixels).sum(0)
        steady = g_bias.reshape(shape) + normal * g_weight.reshape(shape)
        g_x = (weight * inverse).reshape(shape) * (g - steady / count)
        return g_x, g_weight, g_bias, None


@contextmanager
def batch_norm_by_rows(student: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm over pixels trains by `BatchNormByRows`; the function is the same."""
    norms = [
        module
        for module in student.modules()
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)
        and module.affine
        and module.track_running_stats
        and module.momentum is not None
    ]
    for norm in norms:
        norm.forward = functools.partial(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, x: Tensor) -> Tensor:
    if not norm.training:
        return settled(norm, x)
    y, mean, variance = BatchNormByRows.apply(x.float(), norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
    count = x.numel() // x.shape[1]
    track(norm, mean, variance * (count / max(count - 1, 1)))
    return y.to(x.dtype)  # type: ignore[no-any-return]
