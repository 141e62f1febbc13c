"""Of equal values the first is taken."""

from __future__ import annotations

import torch
from small_graphs import before_and_after, traced
from torch import Tensor, nn

from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.stable_top_k import StableTopK


class Best(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best = x.topk(2)
        return best.values, best.indices


def test_top_k_becomes_the_one_that_takes_the_first() -> None:
    before, after = before_and_after(Best(), torch.randn(4, 6), StableTopK())
    assert "topk = x.topk(2)" in before
    assert "getattr_1 = topk.values" in before
    assert "topk = torch.ops.sqakd_fx.top_k.default(x, 2, -1, True)" in after
    assert "getattr_1 = topk[0]" in after


class Order(nn.Module):
    """Sorted values and an order, as functions and as methods."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values, places = torch.sort(x, 1)
        return (
            values,
            places,
            x.sort(descending=True).indices,
            x.argsort(dim=-1),
            torch.argsort(x, 1),
        )


def test_equal_values_stay_in_order_when_they_are_sorted() -> None:
    before, after = before_and_after(Order(), torch.randn(4, 6), StableTopK())
    assert "argsort(" in before
    assert "argsort(" not in after
    assert after.count("stable = True") == 4
    settled = run_passes(traced(Order(), torch.randn(1, 400)), [StableTopK()]).graph_module
    _, *orders = settled(torch.zeros(1, 400))
    assert all(order.tolist() == [list(range(400))] for order in orders)


def test_equal_values_come_in_order() -> None:
    settled = run_passes(traced(Best(), torch.randn(1, 40)), [StableTopK()]).graph_module
    _, chosen = settled(torch.zeros(1, 40))
    assert chosen.tolist() == [[0, 1]]
