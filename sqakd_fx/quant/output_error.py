"""What an error of one value costs the outputs of the layers that read it, in the mean square.

    E[(Σ_j (W - W̃)_oj x_j)²] ≈ Σ_j (W - W̃)²_oj E[x_j²]            of a weight: E[x_j²]
    E[(Σ_j W_oj (x - x̃)_j)²] ≈ Σ_j (x - x̃)²_j Σ_o W_oj²           of an activation: Σ_o W_oj²

Errors of different values count as independent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from sqakd_fx.ir.op_table import Kind, Op, op_of
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.quant.input_statistics import InputStatistics
from sqakd_fx.quant.quantizer import Quantizer


def by_input_channel(node: fx.Node, op: Op, weight: Tensor) -> Tensor:
    """A layer's weight as (groups, outputs of a group, inputs of a group, ...), without a copy."""
    groups = int(node.args[6]) if op.is_convolution else 1  # type: ignore[arg-type]
    parts: Tensor = torch.unflatten(weight, 0, (groups, -1))
    return parts.transpose(1, 2) if op.channel_axis == 1 else parts


def weight_importance(
    node: fx.Node, op: Op, weight: Tensor, seen: Mapping[str, InputStatistics]
) -> Tensor | None:
    """E[x²] of what each element multiplies, of the shape of `weight`; None for a layer that was not seen."""
    if node.name not in seen:
        return None
    square = seen[node.name].square.to(weight.device)
    parts = by_input_channel(node, op, weight)
    per_input = square.reshape(parts.shape[0], 1, -1, *[1] * (parts.ndim - 3)).expand(parts.shape)
    per_input = per_input.transpose(1, 2) if op.channel_axis == 1 else per_input
    return per_input.flatten(0, 1)


def activation_importance(student: fx.GraphModule, node: fx.Node) -> tuple[int, Tensor] | None:
    """The channel axis of what a quantizer node gives, and Σ_o W² of each channel: float32 of shape (channels,).

    None where anything but layers of one kind reads it.
    """
    modules = dict(student.named_modules())
    total: Tensor | None = None
    axes = set()
    for user in node.users:
        op = op_of(user, modules)
        if (
            op is None
            or op.kind is not Kind.COMPUTE
            or op.weight is None
            or user.args[0] is not node
        ):
            return None
        weight = constant_of(student, behind_quantizer(user.args[op.weight], modules))
        if weight is None:
            return None
        parts = by_input_channel(user, op, weight.detach().float())
        energy = parts.square().sum(dim=(1, *range(3, parts.ndim))).reshape(-1)
        axes.add(1 if op.is_convolution else -1)
        total = energy if total is None else total + energy
    return (axes.pop(), total) if total is not None and len(axes) == 1 else None


def behind_quantizer(node: object, modules: Mapping[str, nn.Module]) -> object:
    """The node that a weight's quantizer reads; the node itself where that is no quantizer."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return node
    return node.args[0] if isinstance(modules.get(str(node.target)), Quantizer) else node


def spread_over(importance: Tensor, axis: int, like: Tensor) -> Tensor:
    """The importance of each channel, of the shape of `like`, without a copy."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return importance.to(like.device).reshape(shape).expand(like.shape)


def mean_error(node: fx.Node, op: Op, error: Tensor, mean: Tensor) -> Tensor:
    """E[(W̃ - W) x] of each output channel, (outputs,), from W̃ - W and E[x] of each input channel.

    Padding counts as the mean.
    """
    parts = by_input_channel(node, op, error)
    sums = parts.sum(dim=tuple(range(3, parts.ndim))) if parts.ndim > 3 else parts
    means = mean.to(error.device).reshape(parts.shape[0], -1, 1)
    return torch.matmul(sums, means).reshape(-1)
