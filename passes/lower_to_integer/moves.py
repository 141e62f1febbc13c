"""Clips, moves and choices of values, which work on codes as on what they stand for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx
from torch.nn import functional as F

from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Op
from sqakd_fx.ir.paddings import pad_amounts, pad_value
from sqakd_fx.passes.lower_to_integer.clips import (
    Clip,
    clip_bounds,
    clipped_range,
    is_representable,
)
from sqakd_fx.passes.lower_to_integer.pools_of_codes import pool_of_codes
from sqakd_fx.passes.lower_to_integer.state import Lowering
from sqakd_fx.passes.lower_to_integer.values import Arithmetic, Codes, Layer

_OPS = torch.ops.sqakd_fx


def clipped(lowering: Lowering, node: fx.Node, op: Op) -> Any:
    """A clip that the grid behind it takes over, or a clip of codes; None where its bounds are no codes."""
    bounds = clip_bounds(node, op)
    source = cast(fx.Node, node.args[0])
    value = lowering.values[source]
    if bounds is None:
        return None
    lower, upper = bounds
    if isinstance(value, Layer | Arithmetic):
        return replace(value, clip=value.clip.then(lower, upper))
    if isinstance(value, Codes) and is_representable(value.grid, lower, upper):
        low, high = clipped_range(value.grid, Clip(lower, upper))
        if (low, high) == (value.grid.qmin, value.grid.qmax):
            return value
        new = lowering.graph.call_function(_OPS.clip.default, (value.node, low, high))
        return Codes(new, value.stored.clipped(low, high))
    return None


def moved(lowering: Lowering, node: fx.Node, op: Op) -> Codes | None:
    """The codes of one tensor in another place or order; None where its input is no codes."""
    source = node.args[0] if node.args else None
    value = lowering.values.get(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Codes):
        return None
    if op.pads:
        return _padded(lowering, node, value)
    if op.takes_largest:  # torch pools integers only in the plain memory format
        plain = lowering.graph.call_method("contiguous", (value.node,))
        value = replace(value, node=plain)
    if not op.on_bytes:
        pooled = pool_of_codes(lowering.built, node, op, lowering.modules, value.node)
        return replace(value, node=pooled)
    return replace(value, node=_on_codes(lowering, node, {source: value}))


def joined(lowering: Lowering, node: fx.Node) -> Codes | None:
    """The codes of several tensors of one grid in one; None where they have no grid in common."""
    flat = list(node.all_input_nodes)
    values = [lowering.values[source] for source in flat]
    if not values or not all(isinstance(v, Codes) for v in values):
        return None
    first = values[0]
    if not all(v.grid.same_as(first.grid) for v in values):
        return None
    stored = first.stored.clipped(
        min(v.grid.qmin for v in values), max(v.grid.qmax for v in values)
    )
    return Codes(_on_codes(lowering, node, dict(zip(flat, values, strict=True))), stored)


def _padded(lowering: Lowering, node: fx.Node, value: Codes) -> Codes:
    """Zero is the zero point; -inf, which max pooling reads, is the smallest code."""
    code = value.grid.qmin if pad_value(node) == -math.inf else value.grid.zero_point
    arguments = (value.node, pad_amounts(node))
    return replace(value, node=lowering.graph.call_function(F.pad, arguments, {"value": code}))


def _on_codes(lowering: Lowering, node: fx.Node, codes: dict[Any, Codes]) -> fx.Node:
    def pick(source: fx.Node) -> fx.Node:
        return codes[source].node if source in codes else lowering.float_of(source)

    lowering.bring_module(node)
    new = lowering.graph.node_copy(node, pick)
    meta.keep_only_module_path(new, node)
    return new
