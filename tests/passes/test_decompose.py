"""What hides matrix products or moves of values is spelled out."""

from __future__ import annotations

import pytest
import torch
from small_graphs import before_and_after, traced
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.decompose.rules import Decompose


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Einsum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bid,bjd->bij", x, x)


class Turned(nn.Module):
    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.attribute = attribute

    def forward(self, x: Tensor) -> Tensor:
        part = x if self.attribute[0] == "m" else x[0]
        return torch.matmul(part, getattr(part, self.attribute)) + x.mean()


class Gated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.glu(x, dim=2)


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
        (Turned("mT"), "x.mT", ["getattr_1 = torch.permute(x, [0, 2, 1])"]),
        (Turned("T"), ".T", ["getattr_1 = torch.permute(getitem, [1, 0])"]),
        (Turned("mH"), "x.mH", ["getattr_1 = torch.permute(x, [0, 2, 1])"]),
        (
            Halves(),
            "chunk = x.chunk(2, -1)",
            ["narrow = torch.narrow(x, 2, 0, 8)", "narrow_1 = torch.narrow(x, 2, 8, 8)"],
        ),
        *(
            (
                model,
                whole,
                [
                    f"narrow = torch.narrow({x}, 2, 0, 8)",
                    f"narrow_1 = torch.narrow({x}, 2, 8, 8)",
                    "sigmoid = torch.sigmoid(narrow_1)",
                    f"{name} = torch.mul(narrow, sigmoid)",
                ],
            )
            for model, whole, x, name in (
                (Gated(), "glu(x", "x", "glu"),
                (nn.Sequential(nn.GLU()), 'getattr(self, "0")', "input_1", "_0"),
            )
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


class Experts(nn.Module):
    """Rows sorted by the expert that each is for, and the product of every group."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 8, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].clamp(0, 2).round().sort()
        counts = torch.histc(order.values, bins=3, min=0, max=2)
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        return F.grouped_mm(x[order.indices], self.weights, offs=offsets)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="of torch 2.10")
@pytest.mark.parametrize("share", [0.0, 1.0, 5.0])
def test_products_of_groups_are_a_layer_for_each_expert(share: float) -> None:
    torch.manual_seed(0)
    model, x = Experts(), share * torch.randn(40, 8)
    graph_module = run_passes(traced(model, x), [Decompose()]).graph_module
    assert graph_module.code.count("linear(") == 3
    assert torch.allclose(graph_module(x), model(x), atol=1e-6)


@pytest.mark.parametrize(("bins", "low", "high"), [(4, 0, 3), (5, -1, 1), (3, -0.5, 2.5)])
def test_a_histogram_counts_what_torch_counts(bins: int, low: float, high: float) -> None:
    class Histogram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.histc(x, bins, low, high)

    x = torch.cat([torch.randn(200), torch.arange(-2.0, 5.0)])
    graph_module = run_passes(traced(Histogram(), x), [Decompose()]).graph_module
    assert "histc(" not in graph_module.code
    assert torch.equal(graph_module(x), Histogram()(x))


MASKS: dict[str, Tensor | None] = {
    "no mask": None,
    "causal": None,
    "booleans": torch.ones(5, 7, dtype=torch.bool).tril(2),
    "numbers": torch.linspace(-3, 0, 35).reshape(5, 7),
}


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("query_heads", "heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_in_every_form_is_what_torch_computes(
    query_heads: int, heads: int, mask: str, scale: float | None
) -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kinds = {"is_causal": mask == "causal", "enable_gqa": query_heads != heads}
            return F.scaled_dot_product_attention(q, k, v, MASKS[mask], scale=scale, **kinds)

    torch.manual_seed(0)
    given = (torch.randn(2, query_heads, 5, 8), *torch.randn(2, 2, heads, 7, 8))
    graph_module = run_passes(traced(Grouped(), given), [Decompose()]).graph_module
    assert "scaled_dot_product_attention(" not in graph_module.code.replace("_attention =", "")
    torch.testing.assert_close(graph_module(*given), Grouped()(*given), rtol=1e-5, atol=1e-6)
