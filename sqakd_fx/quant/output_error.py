"""What an error of one weight costs the outputs of its layer, in the mean square.

    E[(Σ_j (W - W̃)_oj x_j)²] ≈ Σ_j (W - W̃)²_oj E[x_j²]

Errors of different values count as independent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from sqakd_fx.ir.op_table import Op
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


def behind_quantizer(node: object, modules: Mapping[str, nn.Module]) -> object:
    """The node that a weight's quantizer reads; the node itself where that is no quantizer."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return node
    return node.args[0] if isinstance(modules.get(str(node.target)), Quantizer) else node


def mean_error(node: fx.Node, op: Op, error: Tensor, mean: Tensor) -> Tensor:
    """E[(W̃ - W) x] of each output channel, (outputs,), from W̃ - W and E[x] of each input channel.

    Padding counts as the mean.
    """
    parts = by_input_channel(node, op, error)
    sums = parts.sum(dim=tuple(range(3, parts.ndim))) if parts.ndim > 3 else parts
    means = mean.to(error.device).reshape(parts.shape[0], -1, 1)
    return torch.matmul(sums, means).reshape(-1)
