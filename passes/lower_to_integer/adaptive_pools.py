"""Adaptive pools in operations that ONNX has: their windows have sizes of their own.

max, windows of one size      max_pool(x, in / out)
max, windows of any size      cat(amax(x[start_j : end_j]) for j), one axis after another
mean of a volume              the mean over height and width, then the mean over depth, both as adaptive_avg_pool2d
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.op_table import TABLE, Kind, op_of, shape_of
from sqakd_fx.passes.lower_to_integer.average_pools import adaptive_pool_settings, pool_arguments

_MAX_POOLS: Mapping[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def adaptive_pool_in_float(
    graph: fx.Graph,
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    float_of: Callable[[fx.Node], fx.Node],
) -> fx.Node | None:
    """`node` as other float operations of `graph`; None for what is no adaptive pool, or has a form as it is."""
    op = TABLE.get((op_name(node, modules) or "").removesuffix("_with_indices"))
    if op is None or not op.adaptive:
        return None
    axes = cast(int, op.axes)
    source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
    ins = (shape_of(source) or ())[-axes:]
    wanted = _wanted(node, modules, ins)
    settings = adaptive_pool_settings(ins, wanted)
    if op.kind is not Kind.AVERAGE:
        gives_places = cast(Any, op_of(node, modules)) is not op
        if gives_places:
            if settings is None:
                return None
            more = {"stride": settings[0], "return_indices": True}
            return graph.call_function(_MAX_POOLS[axes], (float_of(source), settings[0]), more)
        return largest_of_windows(graph, float_of(source), ins, wanted)
    if axes < 3:
        return None
    return _mean_of_volume(graph, float_of(source), shape_of(source) or (), wanted)


def largest_of_windows(
    graph: fx.Graph, x: fx.Node, ins: Sequence[int], wanted: Sequence[int]
) -> fx.Node:
    """The adaptive pool of the largest values of `x`, which has the sizes `ins` behind its channels."""
    axes = len(ins)
    if all(size == 1 for size in wanted):
        reduced: dict[str, Any] = {"dim": tuple(range(-axes, 0)), "keepdim": True}
        return graph.call_function(torch.amax, (x,), reduced)
    settings = adaptive_pool_settings(ins, wanted)
    if settings is not None and axes > 1:
        return graph.call_function(_MAX_POOLS[axes], (x, settings[0]))
    for axis, size, count in zip(range(-axes, 0), ins, wanted, strict=True):
        if size == count:
            continue
        parts = []
        for j in range(count):
            start, end = j * size // count, -(-(j + 1) * size // count)
            window = graph.call_function(torch.narrow, (x, axis, start, end - start))
            parts.append(graph.call_function(torch.amax, (window, axis, True)))
        x = graph.call_function(torch.cat, (parts, axis)) if count > 1 else parts[0]
    return x


def _mean_of_volume(
    graph: fx.Graph, x: fx.Node, ins: Sequence[int], wanted: Sequence[int]
) -> fx.Node:
    depth, height, width = wanted

    def call(name: str, *args: Any) -> fx.Node:
        return graph.call_method(name, args)

    def mean(x: fx.Node, *sizes: int) -> fx.Node:
        return graph.call_function(F.adaptive_avg_pool2d, (x, sizes))

    maps = mean(call("flatten", x, -4, -3), height, width)
    rows = call("flatten", call("unflatten", maps, -3, (ins[-4], ins[-3])), -2)
    return call("unflatten", mean(rows, depth, height * width), -1, (height, width))


def _wanted(node: fx.Node, modules: Mapping[str, nn.Module], ins: Sequence[int]) -> list[int]:
    """The sizes that the pool is told to give; None in a size keeps it."""
    given = pool_arguments(node, modules, {"output_size": None})["output_size"]
    sizes = list(given) if isinstance(given, list | tuple) else [given] * len(ins)
    return [size if made is None else made for size, made in zip(ins, sizes, strict=True)]
