"""Record every node's shape and dtype on one call's inputs, for the passes that follow.

Before:  y = F.linear(x, W)
After:   y = F.linear(x, W)          node.meta["tensor_meta"] of y: (16, 10), float32
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult


@dataclass(frozen=True)
class PropagateShapes(Pass):
    """Record the shape and dtype of every node on one call's inputs.

    `example` holds one call's inputs in the order of the placeholders. What another call of `others` gives another size
    is a free axis; a call that the graph does not take is left out.
    """

    example: tuple[Any, ...]
    others: tuple[tuple[Any, ...], ...] = ()
    name = "propagate_shapes"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        with torch.no_grad():
            ShapeProp(graph_module).propagate(*(x.clone() for x in self.example))
            for other in self.others:
                _record_free_axes(graph_module, tuple(x.clone() for x in other))
        return PassResult(graph_module, False)


def _record_free_axes(graph_module: fx.GraphModule, other: tuple[Any, ...]) -> None:
    running = fx.Interpreter(graph_module, garbage_collect_values=False)
    running.extra_traceback = False
    with suppress(Exception):
        running.run(*other)
    for node, value in running.env.items():
        shape = shape_of(node)
        if shape is None or not isinstance(value, torch.Tensor) or value.ndim != len(shape):
            continue
        unlike = {axis for axis, size in enumerate(value.shape) if size != shape[axis]}
        meta.set_free_axes(node, tuple(sorted({*meta.free_axes(node), *unlike})))
