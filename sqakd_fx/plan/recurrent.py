"""Recurrent layers whose weights are stored in codes: LSTM, GRU and plain RNN, as modules or as functions."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx, nn

from sqakd_fx.ir.op_table import Op, is_float32_tensor, shape_of
from sqakd_fx.ir.rewriting import constant_of

_BATCHED = 3
"""Axes of a batch of sequences."""


def has_stored_weights(
    node: fx.Node, ops: Mapping[fx.Node, Op | None], modules: Mapping[str, nn.Module]
) -> bool:
    """Whether a recurrent layer reads float32 sequences in a batch, and weights that are parameters."""
    op = ops.get(node)
    sequences = node.args[0] if node.args else node.kwargs.get("input")
    if op is None or not op.recurs or not isinstance(sequences, fx.Node):
        return False
    if not is_float32_tensor(sequences) or len(shape_of(sequences) or ()) != _BATCHED:
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = type(module) in (nn.LSTM, nn.GRU, nn.RNN) and not getattr(module, "proj_size", 0)
        return plain and all(isinstance(index, int) for index in _taken(node))
    return node.op == "call_function" and bool(weight_matrices(node))


def _taken(node: fx.Node) -> list[object]:
    """The indices of what is read of the tuple that a module gives."""
    return [user.args[1] for user in node.users if user.target is operator.getitem]


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
