"""Top-k that takes the first of equal values, as ONNX's TopK does; torch.topk takes any of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sqakd_fx::top_k", mutates_args=())
def top_k(x: Tensor, k: int, dim: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k largest or smallest values along `dim`, in order, and their int64 indices."""
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k).clone(), indices.narrow(dim, 0, k).clone()


@top_k.register_fake
def _(x: Tensor, k: int, dim: int, largest: bool) -> tuple[Tensor, Tensor]:
    shape = list(x.shape)
    shape[dim] = k
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, ctx.dim, _ = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, values: Tensor, indices: Tensor | None) -> tuple[Tensor, None, None, None]:
    (chosen,) = ctx.saved_tensors
    return values.new_zeros(ctx.shape).scatter(ctx.dim, chosen, values), None, None, None


top_k.register_autograd(_backward, setup_context=_remember)
