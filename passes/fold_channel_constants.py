"""Fold a constant factor or summand of each channel into the layer in front of it.

    Before:  y = conv(x, W) * a + b        a and b constants with one value a channel
    After:   y = conv(x, aW) + b

These are frozen BatchNorms, which detectors write as a product and a sum, layer scales, and biases that are added
by hand. It works where the layer has no other consumer and its weight no other user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqakd_fx.errors import PassError
from sqakd_fx.ir.op_table import Kind, Op, op_of, shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import constant_of, drop_unused, reads_of
from sqakd_fx.quant.batch_norm import fold_into, sole_compute


@dataclass(frozen=True)
class FoldChannelConstants(Pass):
    """Fold a constant factor or summand of each channel into the layer in front of it."""

    name = "fold_channel_constants"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if graph_module.training:
            raise PassError("folding needs the graph in evaluation mode: call eval() first")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        reads = reads_of(graph_module.graph)
        changed = False
        for node in list(graph_module.graph.nodes):
            op = op_of(node, {}) if node.op == "call_function" else None
            if op is None or op.kind not in (Kind.SUM, Kind.PRODUCT):
                continue
            changed = _fold(graph_module, node, op, reads) or changed
        changed = graph_module.graph.eliminate_dead_code() or changed
        drop_unused(graph_module)
        return PassResult(graph_module, changed)


def _fold(graph_module: fx.GraphModule, node: fx.Node, op: Op, reads: Mapping[str, int]) -> bool:
    layer, constant = _operands(graph_module, node, op)
    if layer is None or constant is None:
        return False
    found = sole_compute(graph_module, layer, reads)
    if isinstance(found, str):
        return False
    values = _of_channels(found, constant)
    if values is None:
        return False
    one, zero = torch.ones_like(values), torch.zeros_like(values)
    if op.kind is Kind.PRODUCT:
        fold_into(graph_module, found, values, zero)
    else:
        fold_into(graph_module, found, one, -values if op.is_difference else values)
    node.replace_all_uses_with(found)
    graph_module.graph.erase_node(node)
    return True


def _operands(
    graph_module: fx.GraphModule, node: fx.Node, op: Op
) -> tuple[fx.Node | None, Tensor | None]:
    """A layer's output and the constant beside it, in either order where they can change places."""
    if node.kwargs or len(node.args) != 2:
        return None, None
    orders = [node.args, node.args[::-1]] if op.commutes else [node.args]
    for value, other in orders:
        constant = constant_of(graph_module, other)
        if isinstance(value, fx.Node) and constant is not None:
            return value, constant
    return None, None


def _of_channels(layer: fx.Node, constant: Tensor) -> Tensor | None:
    """The constant as one value a channel, of shape (channels,); None where it is anything else."""
    op, shape = op_of(layer, {}), shape_of(layer)
    if op is None or shape is None or constant.ndim > len(shape):
        return None
    axis = op.accumulator_axis % len(shape)
    wanted = [shape[axis] if i == axis else 1 for i in range(len(shape))]
    if list(constant.shape) != wanted[len(shape) - constant.ndim :] or constant.numel() == 1:
        return None
    if not constant.is_floating_point():
        return None
    return constant.detach().float().flatten()
