"""An average pool with a divisor of its own, as a plain average pool and a product.

avg_pool(x, kernel, divisor_override=d)     avg_pool(pad(x), kernel) · (values in a window / d)

torch's ONNX translation has no such divisor. The padding, and the overhang of ceil_mode, become zeros in the input:
a window then always has the kernel's number of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.rewriting import call_like, replace_node

_ARGUMENTS = (
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
)
POOLS: Mapping[str, Callable[..., torch.Tensor]] = {
    "avg_pool2d": F.avg_pool2d,
    "avg_pool3d": F.avg_pool3d,
}
"""The average pools that torch gives a divisor, by their names in the op table."""


def spell_out_divisor(
    graph_module: fx.GraphModule,
    node: fx.Node,
    pool: Callable[..., torch.Tensor],
    modules: Mapping[str, nn.Module],
) -> bool:
    """Rewrite `node`, which calls `pool`, as a function or a module; False where it has no divisor of its own."""
    given = _arguments(node, modules)
    divisor = given.get("divisor_override")
    outs, ins = shape_of(node), shape_of(node.all_input_nodes[0])
    if divisor is None or ins is None or outs is None:
        return False
    axes = 3 if pool is F.avg_pool3d else 2
    kernel = _sizes(given["kernel_size"], axes)
    stride = _sizes(given.get("stride") or kernel, axes)
    padding = _sizes(given.get("padding", 0), axes)
    pads: list[int] = []
    for i, o, k, s, p in zip(ins[-axes:], outs[-axes:], kernel, stride, padding, strict=True):
        pads = [p, max(p, (o - 1) * s + k - i - p), *pads]  # the last axis comes first
    with graph_module.graph.inserting_before(node):
        x: Any = node.args[0] if node.args else node.kwargs["input"]
        if any(pads):
            x = call_like(graph_module, node, F.pad, x, tuple(pads))
        mean = call_like(graph_module, node, pool, x, tuple(kernel), tuple(stride))
    return replace_node(graph_module, node, torch.mul, (mean, math.prod(kernel) / divisor))


def _arguments(node: fx.Node, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return {name: getattr(module, name) for name in _ARGUMENTS}
    return dict(zip(_ARGUMENTS, node.args[1:], strict=False)) | dict(node.kwargs)


def _sizes(value: Any, axes: int) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * axes if len(sizes) == 1 else sizes
