"""Mixtures of experts: the products of groups of rows, and the count of rows in each group.

grouped_mm(x, W, offs)          rows of x below offs[0] times W[0], those below offs[1] times W[1], ...
    every expert is a linear layer over all rows, and where(row ≥ offs[e-1], layer_e(x), ...) chooses
histc(x, bins, min, max)        Σ over x of (floor((x - min) · bins / (max - min)) = 0, 1, ...)

An expert thus computes every row that is chosen for any: a layer can be quantized only as a whole.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.rewriting import call_like, constant_of, insert_attribute, replace_node


def spell_out_grouped_product(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Rewrite (rows, in) times (experts, in, out) in groups; False for what is grouped otherwise."""
    names = ("input", "mat2", "offs", "bias", "out_dtype")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, weights, offsets = given["input"], given["mat2"], given.get("offs")
    shape = shape_of(weights) or ()
    if offsets is None or len(shape) != 3 or len(shape_of(x) or ()) != 2:
        return False
    if given.get("bias") is not None:
        return False
    stored = constant_of(graph_module, weights)
    with graph_module.graph.inserting_before(node):
        call = functools.partial(call_like, graph_module, node)
        ones = call(torch.ones_like, call(torch.select, x, 1, 0))
        places = call(torch.sub, call(torch.cumsum, ones, 0), 1)
        chosen: Any = None
        for expert in range(shape[0]):
            if stored is None:
                made = call(torch.matmul, x, call(torch.select, weights, 0, expert))
            else:
                matrix = nn.Parameter(stored[expert].detach().t().contiguous())
                weight = insert_attribute(graph_module, node, f"{weights.target}_{expert}", matrix)
                made = call(F.linear, x, weight, None)
            if chosen is None:
                chosen = made
                continue
            start = call(torch.select, offsets, 0, expert - 1)
            behind = call(torch.unsqueeze, call(torch.ge, places, start), -1)
            chosen = call(torch.where, behind, made, chosen)
    node.replace_all_uses_with(chosen)
    graph_module.graph.erase_node(node)
    return True


def spell_out_histogram(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Rewrite a count of values in bins of one width between two numbers."""
    names = ("input", "bins", "min", "max")
    defaults = {"bins": 100, "min": 0, "max": 0}
    given: dict[str, Any] = defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    bins, low, high = given["bins"], given["min"], given["max"]
    if not all(isinstance(n, int | float) for n in (bins, low, high)) or low >= high:
        return False
    with graph_module.graph.inserting_before(node):
        call = functools.partial(call_like, graph_module, node)
        x = call(torch.flatten, given["input"])
        scaled = call(torch.mul, call(torch.sub, x, low), bins / (high - low))
        place = call(torch.clamp, call(torch.floor, scaled), None, bins - 1)
        place = call(torch.masked_fill, place, call(torch.gt, x, high), -1.0)
        numbers = torch.arange(bins, dtype=torch.float32)
        every = insert_attribute(graph_module, node, f"{node.name}_bins", numbers)
        same = call(torch.eq, call(torch.unsqueeze, place, -1), every)
        found = call(torch.Tensor.float, same)
    return replace_node(graph_module, node, torch.sum, (found, 0))
