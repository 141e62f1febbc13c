"""Read what was changed in place behind the change.

    Before:  y = x.add_(b); z = f(x)          After:  y = x.add_(b); z = f(y)

Later passes replace calls in place by calls that make a new tensor: from here on nobody reads the
old one. Views of a tensor that is changed in place are not followed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from sqakd_fx.compiler import PassResult


@dataclass(frozen=True)
class Functionalize:
    name: str = "functionalize"

    def requires(self, graph_module: fx.GraphModule) -> None:
        pass

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        changed = _read_behind_changes_in_place(graph_module.graph, modules)
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, changed)

    def ensures(self, result: PassResult) -> None:
        pass


def _read_behind_changes_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Whoever reads a tensor after it was changed in place reads the change's result instead."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    changed = False
    for node in graph.nodes:
        if not _is_in_place(node, modules) or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        for user in list(source.users):
            if position[user] > position[node]:
                user.replace_input_with(source, node)
                changed = True
    return changed


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
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
