"""Drop the bias that keys of an attention have in common.

    Before:  softmax(q (k + b)ᵀ)
    After:   softmax(q kᵀ)

q bᵀ adds one number to all scores of a row, and softmax(s + c) = softmax(s). Training leaves b where it drifts to: in a
trained decoder of proteins it is 50 times as large as what the keys tell, and takes all levels of their grid.

Which entries of a bias are of keys is not looked up in patterns. Channel numbers are sent through the graph in place of
values, up to a product of matrices; from there numbers of rows, up to the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sqakd_fx.ir.op_table import Kind, Op, op_of, shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import constant_of, drop_unused, insert_attribute
from sqakd_fx.plan.channel_labels import Refusal, label_behind

_HIDES = -1e8
"""From here down, what a mask puts in the place of a score takes no part in the softmax."""


@dataclass(frozen=True)
class DropKeyBias(Pass):
    """Drop the bias that keys of an attention have in common."""

    name = "drop_key_bias"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        search = _Search(graph_module, dict(graph_module.named_modules()))
        changed = False
        for node in list(graph_module.graph.nodes):
            keys = search.keys(node)
            if keys is not None:
                _drop(graph_module, node, keys)
                changed = True
        if changed:
            graph_module.graph.eliminate_dead_code()
            drop_unused(graph_module)
        return PassResult(graph_module, changed)


def _drop(graph_module: fx.GraphModule, layer: fx.Node, keys: Tensor) -> None:
    """Give a layer a bias of its own without the entries in `keys`, bool of shape (channels,)."""
    bias = constant_of(graph_module, layer.args[2])
    assert bias is not None
    kept = torch.where(keys.to(bias.device), torch.zeros_like(bias), bias.detach())
    name = f"{layer.args[2].target}_without_keys"  # type: ignore[union-attr]
    rest = insert_attribute(graph_module, layer, name, nn.Parameter(kept)) if kept.any() else None
    layer.args = (*layer.args[:2], rest, *layer.args[3:])


@dataclass(frozen=True)
class _Search:
    """Where the channels of a layer go."""

    graph_module: fx.GraphModule
    modules: Mapping[str, nn.Module]

    def keys(self, layer: fx.Node) -> Tensor | None:
        """The channels of a layer whose bias no softmax tells, bool of shape (channels,); None without any."""
        op, shape = op_of(layer, self.modules), shape_of(layer)
        is_layer = op is not None and op.kind is Kind.COMPUTE and op.weight is not None
        bias = constant_of(self.graph_module, layer.args[2]) if is_layer else None
        if op is None or not shape or bias is None or not bias.any():
            return None
        axis = op.accumulator_axis % len(shape)
        weight = constant_of(self.graph_module, layer.args[op.weight or 0])
        if weight is None or (op.is_convolution and len(shape) != weight.ndim):  # no batch axis
            return None
        label = torch.arange(shape[axis]).reshape(
            [-1 if i == axis else 1 for i in range(len(shape))]
        )
        dropped, needed = set[int](), set[int]()
        self._follow(layer, label.expand(shape), dropped, needed)
        found = torch.zeros(shape[axis], dtype=torch.bool)
        found[sorted(dropped - needed)] = True
        return found if bool((found.to(bias.device) & (bias != 0)).any()) else None

    def _follow(self, node: fx.Node, label: Any, dropped: set[int], needed: set[int]) -> None:
        """Sort the channels in a label by what reads them."""
        for user in node.users:
            op = op_of(user, self.modules)
            moved = self._moved(user, op, node, label)
            if moved is not None:
                self._follow(user, moved, dropped, needed)
            elif self._forgets(user, op, node, label):
                dropped |= _channels(label)
            else:
                needed |= _channels(label)

    def _moved(self, user: fx.Node, op: Op | None, node: fx.Node, label: Any) -> Any:
        """The label behind what only moves elements; None behind all else.

        Moves commute with a change of sign, and a maximum over several channels does not.
        """
        if op is None or op.kind is not Kind.TRANSPARENT or op.pads:
            return None
        try:
            moved = label_behind(user, op, {node: label}, self.modules)
            turned = label_behind(user, op, {node: _negated(label)}, self.modules)
        except Refusal:
            return None
        pairs = zip(tree_leaves(moved), tree_leaves(turned), strict=True)
        return moved if all(torch.equal(a, -b) for a, b in pairs) else None

    def _forgets(self, user: fx.Node, op: Op | None, node: fx.Node, label: Any) -> bool:
        """Whether a product of matrices adds what a bias gives to whole rows of a softmax."""
        shape = shape_of(user)
        is_product = op is not None and op.kind is Kind.COMPUTE and op.weighed is not None
        if not is_product or user.args.count(node) != 1 or not isinstance(label, Tensor):
            return False
        axis = -1 if user.args[1] is node else -2
        if not shape or min(label.ndim, len(shape)) < 2 or not _is_constant(label, axis):
            return False
        rows = list(shape)
        rows[axis] = 1
        numbers = torch.arange(math.prod(rows)).reshape(rows).expand(shape)
        return self._reaches_softmax(user, numbers)

    def _reaches_softmax(self, node: fx.Node, rows: Tensor) -> bool:
        """Whether only softmaxes read scores, each over scores of one row, to which one number may be added."""
        return bool(node.users) and all(self._ignores(user, node, rows) for user in node.users)

    def _ignores(self, user: fx.Node, node: fx.Node, rows: Tensor) -> bool:
        op, shape = op_of(user, self.modules), shape_of(user)
        if op is None or shape is None or len(shape) < rows.ndim:
            behind = None if op is None else self._moved(user, op, node, rows)
            return isinstance(behind, Tensor) and self._reaches_softmax(user, behind)
        if op.reads_scores:
            dim = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim")
            return isinstance(dim, int) and _is_constant(rows, dim)
        if op.kind is Kind.SUM or op.kind is Kind.PRODUCT or op.divides:
            return self._stays_of_rows(user, op, node, rows.expand(shape))
        if op.masks and op.kind is Kind.SMOOTH:
            return self._hides(user, node) and self._reaches_softmax(user, rows.expand(shape))
        moved = self._moved(user, op, node, rows)
        return isinstance(moved, Tensor) and self._reaches_softmax(user, moved)

    def _stays_of_rows(self, user: fx.Node, op: Op, node: fx.Node, rows: Tensor) -> bool:
        """Whether a sum, a product or a quotient keeps that one number is added to every row of a softmax."""
        if len(user.args) != 2 or user.args.count(node) != 1 or user.kwargs:
            return False
        other = user.args[1] if user.args[0] is node else user.args[0]
        if op.divides and other is user.args[0]:
            return False
        if op.kind is not Kind.SUM and isinstance(other, fx.Node):
            size = shape_of(other)
            if size is None:
                return False
            factors = torch.arange(math.prod(size)).reshape(size).expand(rows.shape)
            rows = rows * (math.prod(size) + 1) + factors
        return self._reaches_softmax(user, rows)

    def _hides(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether a mask puts numbers in the place of scores that no softmax sees."""
        others = [x for x in user.args if x is not node and not _is_mask(x)]
        if len(others) != 1 or len(user.args) != 3 or user.args.count(node) != 1:
            return False
        constant = constant_of(self.graph_module, others[0])
        value = others[0] if constant is None else float(constant.max())
        return isinstance(value, int | float) and value <= _HIDES


def _is_mask(value: Any) -> bool:
    known = value.meta.get("tensor_meta") if isinstance(value, fx.Node) else None
    return getattr(known, "dtype", None) is torch.bool


def _is_constant(label: Tensor, axis: int) -> bool:
    return -label.ndim <= axis < label.ndim and bool((label == label.narrow(axis, 0, 1)).all())


def _negated(label: Any) -> Any:
    return torch.utils._pytree.tree_map(torch.neg, label)


def _channels(label: Any) -> set[int]:
    return {int(x) for leaf in tree_leaves(label) for x in _once(leaf).reshape(-1).tolist()}


def _once(label: Tensor) -> Tensor:
    """A label without the axes along which it is only expanded."""
    for axis in range(label.ndim):
        if label.stride(axis) == 0:
            label = label.narrow(axis, 0, 1)
    return label
