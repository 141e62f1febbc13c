"""Max pools of uint8 codes by operations that torch has for bytes: it has no max_pool1d and no adaptive pool of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

_ROW = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_ADAPTIVE = ("input", "output_size")
WITHOUT_BYTES = {
    "max_pool1d": _ROW,
    "adaptive_max_pool1d": _ADAPTIVE,
    "adaptive_max_pool2d": _ADAPTIVE,
}
"""Rows of the op table that torch does not compute on bytes, with their arguments."""


def pool_of_codes(
    graph: fx.Graph,
    name: str,
    node: fx.Node,
    module: nn.Module | None,
    codes: fx.Node,
    shape: Sequence[int],
) -> fx.Node:
    """`node`, the pool `name` of `module` or of a call, on `codes`, which are of `shape`."""
    names = WITHOUT_BYTES[name]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if module is not None:
        given = {key: getattr(module, key, None) for key in names}
    if name == "max_pool1d":
        return _pooled_row(graph, codes, given)
    axes = 1 if name.endswith("1d") else 2
    sizes = list(shape[-axes:])
    wanted = given["output_size"]
    wanted = [wanted] * axes if wanted is None or isinstance(wanted, int) else list(wanted)
    wanted = [size if one is None else one for one, size in zip(wanted, sizes, strict=True)]
    if wanted == [1] * axes:
        reduced: dict[str, Any] = {"dim": tuple(range(-axes, 0)), "keepdim": True}
        return graph.call_function(torch.amax, (codes,), reduced)
    if any(size % one for size, one in zip(sizes, wanted, strict=True)):
        floats = graph.call_method("float", (codes,))
        kind = F.adaptive_max_pool1d if axes == 1 else F.adaptive_max_pool2d
        pooled = graph.call_function(kind, (floats, wanted))
        return graph.call_method("to", (pooled, torch.uint8))
    kernel = [size // one for size, one in zip(sizes, wanted, strict=True)]
    if axes == 1:
        return _pooled_row(graph, codes, {"kernel_size": kernel[0]})
    return graph.call_function(F.max_pool2d, (codes, kernel))


def _pooled_row(graph: fx.Graph, codes: fx.Node, given: dict[str, Any]) -> fx.Node:
    """max_pool1d of rows as the max_pool2d of images of height 1."""

    def pair(key: str, across: int, default: Any) -> tuple[int, int]:
        value = given.get(key)
        value = default if value is None or value == () else value
        return across, value if isinstance(value, int) else value[0]

    kernel = pair("kernel_size", 1, None)
    image = graph.call_function(torch.unsqueeze, (codes, -2))
    settings: dict[str, Any] = {
        "stride": pair("stride", 1, kernel[1]),
        "padding": pair("padding", 0, 0),
        "dilation": pair("dilation", 1, 1),
        "ceil_mode": bool(given.get("ceil_mode")),
    }
    pooled = graph.call_function(F.max_pool2d, (image, kernel), settings)
    return graph.call_function(torch.squeeze, (pooled, -2))
