"""Max pools of uint8 codes by operations that torch has for bytes: max_pool1d and adaptive pools it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Op, shape_of
from sqakd_fx.passes.lower_to_integer.adaptive_pools import largest_of_windows
from sqakd_fx.passes.lower_to_integer.average_pools import adaptive_pool_settings, pool_arguments
from sqakd_fx.passes.lower_to_integer.builder import LoweredGraph

_ROW: dict[str, Any] = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
}
"""In the order of torch.nn.functional.max_pool1d."""


def pool_of_codes(
    built: LoweredGraph, node: fx.Node, op: Op, modules: Mapping[str, nn.Module], codes: fx.Node
) -> fx.Node:
    """`node`, a pool that takes the largest value, on `codes`."""
    assert op.axes is not None
    if op.adaptive:
        pooled = _adaptive(built, node, op.axes, codes)
    else:
        pooled = _pooled_row(built.module.graph, codes, **pool_arguments(node, modules, _ROW))
    meta.keep_only_module_path(pooled, node)
    return pooled


def _adaptive(built: LoweredGraph, node: fx.Node, axes: int, codes: fx.Node) -> fx.Node:
    ins, outs = shape_of(cast(fx.Node, node.args[0])), shape_of(node)
    assert ins is not None
    assert outs is not None
    settings = adaptive_pool_settings(ins[-axes:], outs[-axes:])
    if axes == 1 and settings is not None and outs[-1] > 1:
        return _pooled_row(built.module.graph, codes, **{**_ROW, "kernel_size": settings[0]})
    return largest_of_windows(built, codes, ins[-axes:], outs[-axes:])


def _pooled_row(
    graph: fx.Graph,
    codes: fx.Node,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
) -> fx.Node:
    """max_pool1d of rows as the max_pool2d of images of height 1."""

    def pair(above: int, value: Any) -> tuple[int, int]:
        return above, value if isinstance(value, int) else value[0]

    image = graph.call_function(torch.unsqueeze, (codes, -2))
    settings: dict[str, Any] = {
        "stride": pair(1, kernel_size if stride in (None, [], ()) else stride),
        "padding": pair(0, padding),
        "dilation": pair(1, dilation),
        "ceil_mode": ceil_mode,
    }
    pooled = graph.call_function(F.max_pool2d, (image, pair(1, kernel_size)), settings)
    return graph.call_function(torch.squeeze, (pooled, -2))
