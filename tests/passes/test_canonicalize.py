"""Every form of an operation becomes one, and what is the identity in evaluation disappears."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_graphs import before_and_after, calls, traced
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.functionalize import Functionalize
from sqakd_fx.passes.propagate_shapes import PropagateShapes


class ManyForms(nn.Module):
    """The same operations as module, function, method, operator and in-place call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu_()
        y = F.conv2d(x, self.weight, padding=1, bias=None)
        y += x
        y = self.dropout(y.add(x))
        return self.fc(F.relu(y).mean((2, 3)))


def test_every_form_of_an_operation_becomes_one(images: Tensor) -> None:
    model = ManyForms()
    wanted = model.eval()(images)
    result = run_passes(traced(model, images), [Canonicalize()])
    assert calls(result.graph_module) == [
        "conv2d", "relu", "conv2d", "add", "add", "relu", "mean", "linear",
    ]  # fmt: skip
    assert torch.equal(result.graph_module(images), wanted)


class Idle(nn.Module):
    """A layer, changes in place, and what is the identity in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding="same")
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu_()
        y += x
        return self.drop(y).float()


def test_modules_and_changes_in_place_become_calls_and_idle_operations_disappear(
    images: Tensor,
) -> None:
    before, after = before_and_after(Idle(), images, Functionalize(), Canonicalize())
    assert before.splitlines() == [
        "conv = self.conv(x)",
        "relu_ = conv.relu_()",
        "add = relu_ + x",
        "drop = self.drop(add)",
        "float_1 = drop.float()",
        "return float_1",
    ]
    assert after.splitlines() == [
        "conv_weight = self.conv.weight",
        "conv_bias = self.conv.bias",
        "conv = torch.conv2d(x, conv_weight, conv_bias, (1, 1), (1, 1), (1, 1), 1)",
        "relu_ = torch.nn.functional.relu(conv)",
        "add = torch.add(relu_, x)",
        "return add",
    ]


def test_a_product_with_a_constant_matrix_is_a_linear_layer() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.b, x, self.w)

    before, after = before_and_after(Product(), torch.randn(4, 6), Canonicalize())
    assert "addmm = torch.addmm(b, x, w)" in before
    assert "addmm = torch._C._nn.linear(x, w_transposed, b)" in after


@pytest.mark.parametrize(
    "permuted", [lambda w: w.t(), lambda w: w.permute(1, 0), lambda w: w.movedim(0, 1)]
)
def test_a_product_with_a_transposed_weight_reads_the_weight_itself(
    permuted: Callable[[Tensor], Tensor],
) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.b, x, permuted(self.w))

    x = torch.randn(4, 6)
    _, after = before_and_after(Product(), x, PropagateShapes((x,)), Canonicalize())
    assert "addmm = torch._C._nn.linear(x, w, b)" in after
