"""Fold a constant factor or summand into the layer or the BatchNorm in front of it.

    Before:  y = conv(x, W) * a + b        a and b constants with one value a channel, or one for all
    After:   y = conv(x, aW) + b

These are frozen BatchNorms, which detectors write as a product and a sum, layer scales, learned affines, scales of
queries, and biases that are added by hand. It works where the layer has no other consumer and its weight no other user.
A positive factor passes through what lies between, where that keeps ratios: a relu(y) = relu(a y).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from sqakd_fx.errors import PassError
from sqakd_fx.ir.constant_affine import ConstantAffine, constant_affine
from sqakd_fx.ir.op_table import op_of, shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import drop_unused, reads_of
from sqakd_fx.quant.batch_norm import fold_into, is_batch_norm, sole_compute


@dataclass(frozen=True)
class FoldChannelConstants(Pass):
    """Fold a constant factor or summand into the layer or the BatchNorm in front of it."""

    name = "fold_channel_constants"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if graph_module.training:
            raise PassError("folding needs the graph in evaluation mode: call eval() first")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        fold = _Fold(graph_module, reads_of(graph_module.graph), _calls(graph_module.graph))
        changed = False
        for node in list(graph_module.graph.nodes):
            affine = constant_affine(graph_module, node)
            if affine is not None:
                changed = fold.in_front(node, affine) or changed
        changed = graph_module.graph.eliminate_dead_code() or changed
        drop_unused(graph_module)
        return PassResult(graph_module, changed)


def _calls(graph: fx.Graph) -> Counter[str]:
    """How many nodes call each module."""
    return Counter(str(node.target) for node in graph.find_nodes(op="call_module"))


@dataclass(frozen=True)
class _Fold:
    """A graph whose parameters are read as often as `reads` says, and its modules called as often as `calls`."""

    graph_module: fx.GraphModule
    reads: Mapping[str, int]
    calls: Mapping[str, int]

    def in_front(self, node: fx.Node, affine: ConstantAffine) -> bool:
        """Take an affine out of the graph where what makes its value takes it; true where the graph changed."""
        maker = _maker(affine)
        taken = (
            self._by_batch_norm(maker, affine)
            if maker.op == "call_module"
            else self._by_layer(maker, affine)
        )
        if taken:
            node.replace_all_uses_with(affine.value)
            self.graph_module.graph.erase_node(node)
        return taken

    def _by_layer(self, maker: fx.Node, affine: ConstantAffine) -> bool:
        layer, op = sole_compute(self.graph_module, maker, self.reads), op_of(maker, {})
        if isinstance(layer, str) or op is None:
            return False
        found = _of_channels(layer, op.accumulator_axis, affine)
        if found is not None:
            fold_into(self.graph_module, layer, *found)
        return found is not None

    def _by_batch_norm(self, maker: fx.Node, affine: ConstantAffine) -> bool:
        name = str(maker.target)
        if len(maker.users) != 1 or self.calls[name] != 1:
            return False
        module = self.graph_module.get_submodule(name)
        found = _of_channels(maker, 1, affine)
        if found is None or not is_batch_norm(maker, {name: module}):
            return False
        factor, summand = found
        norm: Any = copy.deepcopy(module)
        weight = factor if norm.weight is None else norm.weight.detach() * factor
        bias = summand if norm.bias is None else norm.bias.detach() * factor + summand
        norm.weight, norm.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.graph_module.set_submodule(name, norm)
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


def _of_channels(maker: fx.Node, axis: int, affine: ConstantAffine) -> tuple[Tensor, Tensor] | None:
    """Factor and summand as one value a channel, of shape (channels,); None where they are anything else."""
    shape = shape_of(maker)
    if shape is None or affine.factor.ndim > len(shape):
        return None
    channels = shape[axis % len(shape)]
    wanted = [channels if i == axis % len(shape) else 1 for i in range(len(shape))]
    is_one = affine.factor.numel() == 1
    if not is_one and list(affine.factor.shape) != wanted[len(shape) - affine.factor.ndim :]:
        return None
    return affine.factor.reshape(-1).expand(channels), affine.summand.reshape(-1).expand(channels)
