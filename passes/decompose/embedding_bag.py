"""The mean, sum or maximum of one row of embeddings a sample, as a look-up and a reduction.

sum:   Σ w_i row_i                          w_i: per_sample_weights, and 0 at padding
mean:  Σ w_i row_i / max(Σ w_i, 1)
max:   max row_i over what is no padding    0 where all is padding
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import fx
from torch.nn import functional as F

from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.errors import PassError
from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.rewriting import call_like, replace_node

_NAMES = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
          "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip


def spell_out_embedding_bag(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Rewrite a call of embedding_bag on (batch, length) numbers of rows.

    Raises:
        PassError: bags given by offsets, or rows that the call renormalizes.
    """
    given: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    _require_rows(node, given)
    ids, mode = given["input"], given.get("mode", "mean")
    padding = given.get("padding_idx")
    with graph_module.graph.inserting_before(node):
        call = functools.partial(call_like, graph_module, node)
        rows = call(F.embedding, ids, given["weight"])
        weights = given.get("per_sample_weights")
        kept = None if padding is None else call(torch.ne, ids, _row(given, padding))
        if mode == "max":
            return _largest(graph_module, node, rows, kept)
        if kept is not None:
            kept = call(torch.Tensor.float, kept)
            weights = kept if weights is None else call(torch.mul, weights, kept)
        if weights is None:
            join = torch.mean if mode == "mean" else torch.sum
            return replace_node(graph_module, node, join, (rows, 1))
        total = call(torch.sum, call(torch.mul, rows, call(torch.unsqueeze, weights, -1)), 1)
        if mode == "sum":
            return replace_node(graph_module, node, torch.mul, (total, 1.0))
        count = call(torch.clamp, call(torch.sum, weights, 1, True), 1.0)
    return replace_node(graph_module, node, torch.div, (total, count))


def _require_rows(node: fx.Node, given: dict[str, Any]) -> None:
    reasons = {
        "its bags are given by offsets": given.get("offsets") is not None
        or len(shape_of(given["input"]) or ()) != 2,
        "it renormalizes rows (max_norm)": given.get("max_norm") is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            line = code_line(node)
            raise PassError(
                f"embedding_bag at {line or node.name} cannot be exported, because {reason}: give it numbers of "
                "shape (batch, length), padded by padding_idx, and normalize the table before",
                node=node.name,
            )


def _row(given: dict[str, Any], padding: int) -> int:
    """The row that a padding_idx, which may count from the end, names."""
    rows = (shape_of(given["weight"]) or (0,))[0]
    return padding % rows if rows else padding


def _largest(
    graph_module: fx.GraphModule, node: fx.Node, rows: fx.Node, kept: fx.Node | None
) -> bool:
    if kept is None:
        return replace_node(graph_module, node, torch.amax, (rows, 1))
    call = functools.partial(call_like, graph_module, node)
    padded = call(torch.unsqueeze, call(torch.logical_not, kept), -1)
    largest = call(torch.amax, call(torch.masked_fill, rows, padded, float("-inf")), 1)
    nothing = call(torch.all, cast(Any, padded), 1)
    return replace_node(graph_module, node, torch.masked_fill, (largest, nothing, 0.0))
