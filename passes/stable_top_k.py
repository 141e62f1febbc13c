"""Of equal values the first is taken, as ONNX fixes and torch leaves open: few bits make many equal values.

    Before:  scores, chosen = x.topk(2)
    After:   scores, chosen = sqakd_fx::top_k(x, 2, -1, True)

    Before:  order = x.argsort()
    After:   order = torch.sort(x, stable=True, dim=-1, descending=False)[1]

It may change what the model computes where its own values are equal, which torch decides by chance.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import sqakd_fx.ir.top_k  # noqa: F401  (registers torch.ops.sqakd_fx.top_k)
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import replace_node

_FIELDS = ("values", "indices")
_SORT = ("input", "dim", "descending")


@dataclass(frozen=True)
class StableTopK(Pass):
    """Make top-k and sorting take the first of equal values, as ONNX does."""

    name = "stable_top_k"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        changed = False
        for node in list(graph_module.graph.nodes):
            settle = _SETTLED.get(op_name(node, modules) or "")
            if settle is not None:
                settle(graph_module, node)
                changed = True
        return PassResult(graph_module, changed)


def _pick_by_number(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Values and indices that are read by name are read by their place."""
    for user in list(node.users):
        if user.target is getattr:
            index = _FIELDS.index(str(user.args[1]))
            replace_node(graph_module, user, operator.getitem, (node, index))


def _sort(graph_module: fx.GraphModule, node: fx.Node) -> None:
    _pick_by_number(graph_module, node)
    arguments, settings = _order(node)
    node.op, node.target, node.args, node.kwargs = "call_function", torch.sort, arguments, settings


def _argsort(graph_module: fx.GraphModule, node: fx.Node) -> None:
    arguments, settings = _order(node)
    with graph_module.graph.inserting_before(node):
        both = graph_module.graph.call_function(torch.sort, arguments, settings)
    meta.keep_origin(both, node)
    replace_node(graph_module, node, operator.getitem, (both, 1))


def _order(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a stable sort; the overloads `stable` have that setting in front."""
    overload = getattr(node.target, "_overloadname", "")
    names = ("input", "stable", "dim", "descending") if overload == "stable" else _SORT
    given: dict[str, Any] = {"dim": -1, "descending": False}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    settings = {"stable": True, "dim": given["dim"], "descending": given["descending"]}
    return (given.get("input", given.get("self")),), settings


def _top_k(graph_module: fx.GraphModule, node: fx.Node) -> None:
    _pick_by_number(graph_module, node)
    names = ("input", "k", "dim", "largest", "sorted")
    given: dict[str, Any] = {"dim": -1, "largest": True}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    arguments = tuple(given[name] for name in names[:-1])
    replace_node(graph_module, node, torch.ops.sqakd_fx.top_k.default, arguments)


_SETTLED: dict[str, Callable[[fx.GraphModule, fx.Node], None]] = {
    "topk": _top_k,
    "sort": _sort,
    "argsort": _argsort,
}
