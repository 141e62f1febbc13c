"""Fold a constant factor or summand, one for all channels, into the layers behind it.

    Before:  y = conv(relu(x) * a + b, W)        a and b numbers
    After:   y = conv(relu(x), aW) + b ΣW

It is how a learned affine behind an activation (LAB) computes. A summand stays where the convolution pads with
zeros: there it is b / a of what the weights then multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from sqakd_fx.errors import PassError
from sqakd_fx.ir.constant_affine import constant_affine
from sqakd_fx.ir.op_table import op_of, shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import constant_of, drop_unused, insert_attribute, reads_of
from sqakd_fx.quant.batch_norm import why_not_rescaled

_LARGEST_RATIO = 100.0
"""Of summand and factor: a larger summand would take the digits of what it is added to."""


@dataclass(frozen=True)
class FoldScalars(Pass):
    """Fold a constant factor or summand, one for all channels, into the layers behind it."""

    name = "fold_scalars"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if graph_module.training:
            raise PassError("folding needs the graph in evaluation mode: call eval() first")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        fold = _Fold(graph_module, reads_of(graph_module.graph))
        changed = False
        for node in reversed(list(graph_module.graph.nodes)):
            changed = fold.behind(node) or changed
        changed = graph_module.graph.eliminate_dead_code() or changed
        drop_unused(graph_module)
        return PassResult(graph_module, changed)


@dataclass(frozen=True)
class _Scalar:
    """factor * value + summand."""

    value: fx.Node
    factor: float
    summand: float


@dataclass(frozen=True)
class _Fold:
    """A graph whose parameters are read as often as `reads` says."""

    graph_module: fx.GraphModule
    reads: Mapping[str, int]

    def behind(self, node: fx.Node) -> bool:
        """Take a scalar out of the graph, where all layers behind take it; true where the graph changed."""
        scalar = self._scalar(node)
        layers = list(node.users)
        if scalar is None or not layers or not all(self._reads(one, node) for one in layers):
            return False
        if scalar.summand and not all(map(_takes_summands, layers)):
            return self._swap(node, scalar)
        for layer in layers:
            self._absorb(layer, scalar)
        node.replace_all_uses_with(scalar.value)
        self.graph_module.graph.erase_node(node)
        return True

    def _scalar(self, node: fx.Node) -> _Scalar | None:
        """What a node does to its value beside one constant number, in which it keeps its shape."""
        affine = constant_affine(self.graph_module, node)
        if affine is None or affine.factor.numel() != 1:
            return None
        shape = shape_of(affine.value)
        if shape is None or shape_of(node) != shape:
            return None
        return _Scalar(affine.value, affine.factor.item(), affine.summand.item())

    def _reads(self, layer: fx.Node, value: fx.Node) -> bool:
        """Whether a layer reads a value as what its weights multiply, and a change of them changes nothing else."""
        op = op_of(layer, {}) if layer.op == "call_function" else None
        if op is None or op.weight is None or layer.all_input_nodes.count(value) != 1:
            return False
        is_input = layer.args[0] is value
        return is_input and why_not_rescaled(self.graph_module, layer, self.reads) is None

    def _absorb(self, layer: fx.Node, scalar: _Scalar) -> None:
        """Give a layer weights and a bias that do the same to the value as it did to what the scalar made of it."""
        weight, bias = (constant_of(self.graph_module, one) for one in layer.args[1:3])
        assert weight is not None
        stem = str(layer.args[1].target).removesuffix("_scaled")  # type: ignore[union-attr]
        new = list(layer.args)
        if scalar.factor != 1:
            new[1] = self._stored(layer, f"{stem}_scaled", weight * scalar.factor)
        if scalar.summand:
            more = scalar.summand * weight.flatten(1).sum(1)
            name = f"{stem.removesuffix('weight')}bias_shifted"
            new[2] = self._stored(layer, name, more if bias is None else bias + more)
        layer.args = tuple(new)

    def _stored(self, layer: fx.Node, name: str, value: Tensor) -> fx.Node:
        return insert_attribute(self.graph_module, layer, name, nn.Parameter(value.detach()))

    def _swap(self, node: fx.Node, scalar: _Scalar) -> bool:
        """Of a product and a sum behind it, make a sum and a product, and fold the product."""
        before = self._scalar(scalar.value)
        if scalar.factor != 1 or before is None or before.summand or len(scalar.value.users) != 1:
            return False
        if abs(scalar.summand) > _LARGEST_RATIO * abs(before.factor):
            return False
        node.args = tuple(
            before.value if one is scalar.value else self._divided(node, one, before.factor)
            for one in node.args
        )
        for layer in list(node.users):
            self._absorb(layer, replace(before, value=node))
        return True

    def _divided(self, node: fx.Node, constant: Any, by: float) -> Any:
        """A number or a stored tensor, divided by a number."""
        if not isinstance(constant, fx.Node):
            return constant / by
        stored = constant_of(self.graph_module, constant)
        assert stored is not None
        return self._stored(node, f"{constant.target}_divided", stored / by)


def _takes_summands(layer: fx.Node) -> bool:
    """Whether a constant that is added to all a layer reads adds a constant to each channel of what it makes."""
    op = op_of(layer, {})
    if op is None or op.transposed:
        return False
    if not op.is_convolution:
        return True
    return not any(layer.args[op.arguments.index("padding")])  # type: ignore[arg-type]
