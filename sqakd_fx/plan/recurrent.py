"""Recurrent layers whose weights are stored in codes: LSTM, GRU and plain RNN, as modules or as functions."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import fx, nn

from sqakd_fx.ir.meta import module_path, own_name
from sqakd_fx.ir.op_table import Op, is_float32_tensor, shape_of
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.recipe.keys import Recipe

_BATCHED = 3
"""Axes of a batch of sequences."""


def stored_matrices(
    node: fx.Node,
    ops: Mapping[fx.Node, Op | None],
    modules: Mapping[str, nn.Module],
    recipe: Recipe,
) -> list[str]:
    """The weights of a recurrent layer that are stored in codes, by the names of their tensors.

    The layer reads float32 sequences in a batch, and its weights are parameters; no override leaves them in float.
    """
    op = ops.get(node)
    sequences = node.args[0] if node.args else node.kwargs.get("input")
    if op is None or not op.recurs or not isinstance(sequences, fx.Node):
        return []
    if not is_float32_tensor(sequences) or len(shape_of(sequences) or ()) != _BATCHED:
        return []
    return [name for name in _matrices(node, modules) if not _overrides(recipe, node, op, name)]


def recurrent_overrides(
    ops: Mapping[fx.Node, Op | None], modules: Mapping[str, nn.Module], recipe: Recipe
) -> set[int]:
    """The places of the recipe's overrides that leave a recurrent layer or one of its weights in float."""
    found: set[int] = set()
    for node, op in ops.items():
        if op is not None and op.recurs:
            for name in _matrices(node, modules):
                found.update(_overrides(recipe, node, op, name))
    return found


def weight_matrices(node: fx.Node) -> list[fx.Node]:
    """The stored matrices among the parameters that a function of a recurrent layer reads."""
    lists = [given for given in node.args if isinstance(given, list | tuple)]
    nodes = [one for given in lists for one in given if isinstance(one, fx.Node)]
    owner = node.graph.owning_module
    return [
        one
        for one in nodes
        if one.op == "get_attr"
        and owner is not None
        and (tensor := constant_of(owner, one)) is not None
        and tensor.ndim == 2
    ]


def _matrices(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[str]:
    if node.op != "call_module":
        return [str(one.target) for one in weight_matrices(node)]
    module = modules[str(node.target)]
    plain = type(module) in (nn.LSTM, nn.GRU, nn.RNN) and not getattr(module, "proj_size", 0)
    if not plain or not all(isinstance(index, int) for index in _taken(node)):
        return []
    return [f"{node.target}.{name}" for name, p in module.named_parameters() if p.ndim == 2]


def _taken(node: fx.Node) -> list[object]:
    """The indices of what is read of the tuple that a module gives."""
    return [user.args[1] for user in node.users if user.target is operator.getitem]


def _overrides(recipe: Recipe, node: fx.Node, op: Op, matrix: str) -> list[int]:
    """The places of the overrides that leave a weight in float."""
    names = (module_path(node), str(node.target), node.name, op.name, matrix)
    return [
        index
        for index, override in enumerate(recipe.override)
        if override.float is True
        and (
            override.match in (own_name(node), matrix)
            if override.exact
            else any(fnmatchcase(name, override.match) for name in names)
        )
    ]
