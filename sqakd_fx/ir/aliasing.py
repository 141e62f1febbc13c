"""Which tensors of a graph share memory, and what changes them in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import fx, nn

from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.op_table import VIEWS, op_of
from sqakd_fx.ir.size_queries import asks_for_size


def is_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True where the node's first input holds the node's result afterwards."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.kwargs.get("inplace"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = str(getattr(node.target, "__name__", ""))
    if getattr(node.target, "__module__", "") == "_operator":
        return name in ("iadd", "isub", "imul", "itruediv", "imatmul")
    return name.endswith("_") and not name.endswith("__")


def change_seen_elsewhere(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The first change in place that is read through another view of the same memory.

    v = x[:, :4]; v.relu_(); y = f(x)          f sees the change although x was not named
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # the tensor that a view looks at
    same: dict[fx.Node, fx.Node] = {}  # the tensor that a change in place returns
    parameters: dict[str, fx.Node] = {}
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        changes = source is not None and is_in_place(node, modules)
        if node.op == "get_attr":
            first = parameters.setdefault(str(node.target), node)
            memory[node], same[node] = first, first
        elif source is not None and changes:
            memory[node], same[node] = memory[source], same[source]
        else:
            looks = (
                source is not None
                and op_name(node, modules) in VIEWS
                and not _copies(node, modules)
            )
            memory[node] = memory[source] if source is not None and looks else node
            same[node] = node
        sharing.setdefault(memory[node], []).append(node)
        if changes and any(
            same[other] is not same[node] and _is_read_after(other, position[node], position)
            for other in sharing[memory[node]]
        ):
            return cast(fx.Node, node)
    return None


def _copies(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for an index by tensors or lists."""
    leaves = torch.utils._pytree.tree_leaves(node.args[1:])
    lists = node.args[1:] if isinstance(node.args[-1], list) else ()
    op = op_of(node, modules)
    by_tensors = any(isinstance(x, fx.Node) and "tensor_meta" in x.meta for x in leaves)
    return op is not None and op.indexes and (bool(lists) or by_tensors)


def _is_read_after(node: fx.Node, moment: int, position: Mapping[fx.Node, int]) -> bool:
    return any(position[user] > moment and not asks_for_size(user) for user in node.users)
