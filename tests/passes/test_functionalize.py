"""Who reads a tensor behind a change in place reads the result of the change."""

from __future__ import annotations

import pytest
import torch
from small_graphs import before_and_after, traced
from torch import Tensor, nn

from sqakd_fx.errors import PassError
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.functionalize import Functionalize


class Changed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = torch.neg(y)
        y.add_(1.0)
        return z + torch.sigmoid(y)


def test_who_reads_behind_the_change_reads_its_result() -> None:
    before, after = before_and_after(Changed(), torch.randn(4, 6), Functionalize())
    assert "sigmoid = torch.sigmoid(fc)" in before
    assert "sigmoid = torch.sigmoid(add_)" in after
    assert "neg = torch.neg(fc)" in after  # it reads what was there before the change


def test_a_change_that_another_view_reads_is_refused() -> None:
    graph = traced(Changed(), torch.randn(4, 6))
    with graph.graph.inserting_before(graph.graph.output_node()):
        (result,) = graph.graph.output_node().all_input_nodes
        view = graph.graph.call_method("view", (result, 4, 6))
        graph.graph.call_method("relu_", (view,))
        read = graph.graph.call_function(torch.neg, (result,))
    graph.graph.output_node().replace_input_with(result, read)
    with pytest.raises(
        PassError, match=r"functionalize: relu_ changes memory that another view reads"
    ):
        run_passes(graph, [Functionalize()])
