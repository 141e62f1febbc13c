"""Zeros in front of a convolution are its own padding: the runtime pads codes in a node of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import fx
from torch.nn import functional as F

from sqakd_fx.passes.lower_to_integer.values import Codes

_GEOMETRY = 4
"""Stride, padding, dilation and groups, of a convolution."""


def drop_unread_pads(graph: fx.Graph) -> None:
    """Leave out the pads that every convolution behind them has taken over."""
    for node in graph.find_nodes(op="call_function", target=F.pad):
        if not node.users:
            graph.erase_node(node)


def without_pad(x: Codes, arguments: tuple[Any, ...]) -> tuple[Codes, tuple[Any, ...]]:
    """The input and the arguments of a convolution, with the zeros that were added in front in its padding."""
    node = x.node
    if len(arguments) != _GEOMETRY or node.target is not F.pad:
        return x, arguments
    stride, padding, dilation, groups = arguments
    amounts, axes = list(cast(tuple[int, ...], node.args[1])), len(stride)
    amounts += [0] * (2 * axes - len(amounts))
    zeros = node.kwargs["value"] == x.grid.zero_point
    if not zeros or min(amounts) < 0 or any(amounts[2 * axes :]):
        return x, arguments
    spatial = amounts[: 2 * axes]  # the last axis first
    starts = [p + a for p, a in zip(padding, reversed(spatial[0::2]), strict=True)]
    ends = [p + a for p, a in zip(padding, reversed(spatial[1::2]), strict=True)]
    source = replace(x, node=cast(fx.Node, node.args[0]))
    return source, (stride, starts if starts == ends else [*starts, *ends], dilation, groups)
