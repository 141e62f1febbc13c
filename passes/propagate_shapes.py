"""Record every node's shape and dtype on one call's inputs, for the passes that follow.

Before:  y = F.linear(x, W)
After:   y = F.linear(x, W)          node.meta["tensor_meta"] of y: (16, 10), float32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from sqakd_fx.ir.pass_manager import Pass, PassResult


@dataclass(frozen=True)
class PropagateShapes(Pass):
    """Record the shape and dtype of every node on one call's inputs.

    `example` holds one call's inputs in the order of the placeholders.
    """

    example: tuple[Any, ...]
    name = "propagate_shapes"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        with torch.no_grad():
            ShapeProp(graph_module).propagate(*(x.clone() for x in self.example))
        return PassResult(graph_module, False)
