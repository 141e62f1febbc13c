"""Every node knows the shape and dtype that it has on the example."""

from __future__ import annotations

import torch
from small_graphs import before_and_after, traced
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.decompose.rules import Decompose
from sqakd_fx.passes.propagate_shapes import PropagateShapes


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_new_nodes_have_shapes_and_the_graph_stays_as_it_is() -> None:
    x = torch.randn(4, 7, 16)
    before, after = before_and_after(Attention(), x, Decompose(), PropagateShapes((x,)))
    assert before == after
    graph_module = run_passes(traced(Attention(), x), [Decompose()]).graph_module
    shapes = {node.name: shape_of(node) for node in graph_module.graph.nodes}
    assert shapes["matmul"] is None
    run_passes(graph_module, [PropagateShapes((x,))])
    shapes = {node.name: shape_of(node) for node in graph_module.graph.nodes}
    assert shapes == {
        "x": (4, 7, 16),
        "transpose": (4, 16, 7),
        "matmul": (4, 7, 7),
        "mul": (4, 7, 7),
        "softmax": (4, 7, 7),
        "scaled_dot_product_attention": (4, 7, 16),
        "output": (4, 7, 16),
    }
