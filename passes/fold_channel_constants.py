"""Fold a constant factor or summand into the layer in front of it.

    Before:  y = conv(x, W) * a + b        a and b constants with one value a channel, or one for all
    After:   y = conv(x, aW) + b

These are frozen BatchNorms, which detectors write as a product and a sum, layer scales, learned affines, scales of
queries, and biases that are added by hand. It works where the layer has no other consumer and its weight no other user.
A positive factor passes through what lies between, where that keeps ratios: a relu(y) = relu(a y).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from sqakd_fx.errors import PassError
from sqakd_fx.ir.constant_affine import ConstantAffine, constant_affine
from sqakd_fx.ir.op_table import op_of, shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import drop_unused, reads_of
from sqakd_fx.quant.batch_norm import fold_into, sole_compute


@dataclass(frozen=True)
class FoldChannelConstants(Pass):
    """Fold a constant factor or summand into the layer in front of it."""

    name = "fold_channel_constants"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if graph_module.training:
            raise PassError("folding needs the graph in evaluation mode: call eval() first")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        reads = reads_of(graph_module.graph)
        changed = False
        for node in list(graph_module.graph.nodes):
            affine = constant_affine(graph_module, node)
            if affine is not None:
                changed = _fold(graph_module, node, affine, reads) or changed
        changed = graph_module.graph.eliminate_dead_code() or changed
        drop_unused(graph_module)
        return PassResult(graph_module, changed)


def _fold(
    graph_module: fx.GraphModule, node: fx.Node, affine: ConstantAffine, reads: Mapping[str, int]
) -> bool:
    found = sole_compute(graph_module, _maker(affine), reads)
    if isinstance(found, str):
        return False
    factor, summand = (_of_channels(found, c) for c in (affine.factor, affine.summand))
    if factor is None or summand is None:
        return False
    fold_into(graph_module, found, factor, summand)
    node.replace_all_uses_with(affine.value)
    graph_module.graph.erase_node(node)
    return True


def _maker(affine: ConstantAffine) -> fx.Node:
    """What makes the value, in front of functions through which a factor passes."""
    node = affine.value
    if affine.summand.any() or not (affine.factor > 0).all():
        return node
    while len(node.users) == 1 and _keeps_ratios(node):
        node = node.all_input_nodes[0]
    return node


def _keeps_ratios(node: fx.Node) -> bool:
    op = op_of(node, {}) if node.op == "call_function" else None
    return op is not None and op.keeps_ratios


def _of_channels(layer: fx.Node, constant: Tensor) -> Tensor | None:
    """The constant as one value a channel, of shape (channels,); None where it is anything else."""
    op, shape = op_of(layer, {}), shape_of(layer)
    if op is None or shape is None or constant.ndim > len(shape):
        return None
    axis = op.accumulator_axis % len(shape)
    if constant.numel() == 1:
        return constant.reshape(1).expand(shape[axis])
    wanted = [shape[axis] if i == axis else 1 for i in range(len(shape))]
    if list(constant.shape) != wanted[len(shape) - constant.ndim :]:
        return None
    return constant.flatten()
