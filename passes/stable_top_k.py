"""Of equal values the first is taken, as ONNX fixes and torch leaves open: few bits make many equal values.

    Before:  scores, chosen = x.topk(2)
    After:   scores, chosen = sqakd_fx::top_k(x, 2, -1, True)

It may change what the model computes where its own values are equal, which torch decides by chance.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import sqakd_fx.ir.top_k  # noqa: F401  (registers torch.ops.sqakd_fx.top_k)
from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import replace_node

_FIELDS = ("values", "indices")


@dataclass(frozen=True)
class StableTopK(Pass):
    """Make top-k take the first of equal values, as ONNX does."""

    name = "stable_top_k"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        found = [node for node in graph_module.graph.nodes if op_name(node, modules) == "topk"]
        for node in found:
            _settle(graph_module, node)
        return PassResult(graph_module, bool(found))


def _settle(graph_module: fx.GraphModule, node: fx.Node) -> None:
    for user in list(node.users):
        if user.target is getattr:
            index = _FIELDS.index(str(user.args[1]))
            replace_node(graph_module, user, operator.getitem, (node, index))
    names = ("input", "k", "dim", "largest", "sorted")
    given: dict[str, Any] = {"dim": -1, "largest": True}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    arguments = tuple(given[name] for name in names[:-1])
    replace_node(graph_module, node, torch.ops.sqakd_fx.top_k.default, arguments)
