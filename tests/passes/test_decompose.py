"""What hides matrix products or moves of values is spelled out."""

from __future__ import annotations

import pytest
import torch
from small_graphs import before_and_after
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.passes.decompose.rules import Decompose


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Einsum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bid,bjd->bij", x, x)


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return left * right


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x[:, 0], x[:, 1, :4])


@pytest.mark.parametrize(
    ("model", "whole", "parts"),
    [
        (
            Attention(),
            "scaled_dot_product_attention(x, x, x)",
            [
                "transpose = torch.transpose(x, -2, -1)",
                "matmul = torch.matmul(x, transpose)",
                "mul = torch.mul(matmul, 0.25)",
                "softmax = torch.nn.functional.softmax(mul, dim = -1)",
                "scaled_dot_product_attention = torch.matmul(softmax, x)",
            ],
        ),
        (
            Einsum(),
            "einsum('bid,bjd->bij', x, x)",
            [
                "permute_1 = torch.permute(x, [0, 2, 1])",
                "matmul = torch.matmul(permute, permute_1)",
            ],
        ),
        (
            Halves(),
            "chunk = x.chunk(2, -1)",
            ["narrow = torch.narrow(x, 2, 0, 8)", "narrow_1 = torch.narrow(x, 2, 8, 8)"],
        ),
        (
            Cell(),
            "torch.rnn_tanh_cell(",
            ["add = torch.add(linear, linear_1)", "rnn_tanh_cell = torch.tanh(add)"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_an_operation_becomes_its_parts(model: nn.Module, whole: str, parts: list[str]) -> None:
    before, after = before_and_after(model, torch.randn(4, 7, 16), Decompose())
    assert whole in before
    assert whole not in after
    assert set(parts) <= set(after.splitlines())
