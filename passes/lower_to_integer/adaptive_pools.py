"""Adaptive pools in operations that ONNX has: their windows have sizes of their own.

max, windows of one size      max_pool(x, in / out)
max, windows of any size      amax of what each window reads, gathered along one axis after another
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.op_table import TABLE, Kind, op_of, shape_of
from sqakd_fx.ir.windows import adaptive_windows
from sqakd_fx.passes.lower_to_integer.average_pools import adaptive_pool_settings, pool_arguments
from sqakd_fx.passes.lower_to_integer.builder import LoweredGraph

_MAX_POOLS: Mapping[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def adaptive_max_pool_in_float(
    built: LoweredGraph,
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    float_of: Callable[[fx.Node], fx.Node],
) -> fx.Node | None:
    """`node` as other float operations of `built`; None for what is no such pool, or has a form as it is."""
    op = TABLE.get((op_name(node, modules) or "").removesuffix("_with_indices"))
    if op is None or not op.adaptive or op.kind is Kind.AVERAGE:
        return None
    axes = cast(int, op.axes)
    source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
    ins = (shape_of(source) or ())[-axes:]
    wanted = _wanted(node, modules, ins)
    settings = adaptive_pool_settings(ins, wanted)
    gives_places = cast(Any, op_of(node, modules)) is not op
    if not gives_places:
        return largest_of_windows(built, float_of(source), ins, wanted)
    if settings is None:
        return None
    more = {"stride": settings[0], "return_indices": True}
    return built.module.graph.call_function(_MAX_POOLS[axes], (float_of(source), settings[0]), more)


def largest_of_windows(
    built: LoweredGraph, x: fx.Node, ins: Sequence[int], wanted: Sequence[int]
) -> fx.Node:
    """The adaptive pool of the largest values of `x`, which has the sizes `ins` behind its channels."""
    axes, graph = len(ins), built.module.graph
    if all(size == 1 for size in wanted):
        reduced: dict[str, Any] = {"dim": tuple(range(-axes, 0)), "keepdim": True}
        return graph.call_function(torch.amax, (x,), reduced)
    settings = adaptive_pool_settings(ins, wanted)
    if settings is not None and axes > 1:
        return graph.call_function(_MAX_POOLS[axes], (x, settings[0]))
    for axis, size, count in zip(range(-axes, 0), ins, wanted, strict=True):
        if size == count:
            continue
        places, _ = adaptive_windows(size, count)
        stored = built.buffer(f"windows_of_{size}_in_{count}", places.flatten())
        read = graph.call_function(torch.index_select, (x, axis, stored))
        windows = graph.call_method("unflatten", (read, axis, tuple(places.shape)))
        x = graph.call_function(torch.amax, (windows, axis))
    return x


def _wanted(node: fx.Node, modules: Mapping[str, nn.Module], ins: Sequence[int]) -> list[int]:
    """The sizes that the pool is told to give; None in a size keeps it."""
    given = pool_arguments(node, modules, {"output_size": None})["output_size"]
    sizes = list(given) if isinstance(given, list | tuple) else [given] * len(ins)
    return [size if made is None else made for size, made in zip(ins, sizes, strict=True)]
