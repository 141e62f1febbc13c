"""Of equal values the first is taken, as ONNX fixes and torch leaves open: few bits make many equal values.

    topk(x, k)    the first k of a stable sort

It may change what the model computes where its own values are equal, which torch decides by chance.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from sqakd_fx.compiler import PassResult
from sqakd_fx.graphs import call_like, replace_node
from sqakd_fx.ops import op_name

_FIELDS = {"values": 0, "indices": 1}


@dataclass(frozen=True)
class SettleTies:
    name: str = "settle_ties"

    def requires(self, graph_module: fx.GraphModule) -> None:
        pass

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        found = [node for node in graph_module.graph.nodes if op_name(node, modules) == "topk"]
        settled = [_settle(graph_module, node) for node in found]
        return PassResult(graph_module, any(settled))

    def ensures(self, result: PassResult) -> None:
        pass


def _settle(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """False where the pair of values and indices is handed on as a whole."""
    names = ("input", "k", "dim", "largest", "sorted")
    given: dict[str, Any] = {"dim": -1, "largest": True}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    picks = list(node.users)
    if not all(user.target in (operator.getitem, getattr) for user in picks):
        return False
    x, k, dim = given["input"], given["k"], given["dim"]
    with graph_module.graph.inserting_before(node):
        ordered = call_like(
            graph_module, node, torch.sort, x, dim=dim, descending=given["largest"], stable=True
        )
        whole = [call_like(graph_module, node, operator.getitem, ordered, i) for i in (0, 1)]
    for user in picks:
        field = cast(Any, user.args[1])
        part = whole[_FIELDS.get(field, field)]
        replace_node(graph_module, user, torch.narrow, (part, dim, 0, k))
    graph_module.graph.erase_node(node)
    return True
