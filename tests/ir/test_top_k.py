"""Of equal values the first are taken, by the trained graph as by the exported model."""

from __future__ import annotations

from pathlib import Path

import torch
from common_models import ROWS, compiled
from torch import Tensor, nn
from torch.nn import functional as F

import sqakd_fx.ir.top_k  # noqa: F401  (registers torch.ops.sqakd_fx.top_k)

TOP_K = torch.ops.sqakd_fx.top_k.default


class Routed(nn.Module):
    """Two experts of eight for every sample, where many have no score and so the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.out = nn.Linear(6, 8), nn.Linear(6, 40), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        best = F.relu(self.gate(x) - 1).topk(2)
        scores, chosen = best.values, best.indices
        every = self.experts(x).unflatten(1, (8, 5))
        picked = torch.gather(every, 1, chosen[:, :, None].expand(-1, -1, 5))
        return self.out((picked * (1 + scores[:, :, None])).sum(1))


class Ranked(nn.Module):
    """All scores in order, and the pair of the best handed on as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, torch.return_types.topk]:
        y = F.relu(self.a(x))
        order = torch.argsort(y, dim=1, stable=True)
        return self.b(y.gather(1, order)), torch.topk(y, k=2, dim=1, largest=False)


def test_of_equal_values_the_first_are_taken() -> None:
    scores = torch.tensor([[0.0, 2, 0, 2, 0, 2, 2, 1]])
    values, indices = TOP_K(scores, 6, 1, True)
    assert values.tolist() == [[2, 2, 2, 2, 1, 0]]
    assert indices.tolist() == [[1, 3, 5, 6, 7, 0]]
    assert TOP_K(scores, 3, -1, False)[1].tolist() == [[0, 2, 4]]


def test_the_gradient_is_that_of_torch() -> None:
    x, weights = torch.randn(3, 7, 4), torch.randn(3, 2, 4)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (TOP_K(ours, 2, 1, True)[0] * weights).sum().backward()
    (theirs.topk(2, dim=1).values * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
    torch.library.opcheck(TOP_K, (ours, 2, 1, True))


def test_a_choice_among_equal_scores_is_the_runtime_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = ROWS.repeat(8, 1).cumsum(1)
    for make in (Routed, Ranked):
        _, checked = compiled(make().eval(), (x,), {}, "w4a4", tmp_path)
        assert checked.failures == ()
