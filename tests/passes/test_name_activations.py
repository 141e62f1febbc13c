"""Activation functions that are spelt as sums and products get their names."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from small_graphs import before_and_after, calls, traced
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.fold_constants import FoldConstants
from sqakd_fx.passes.name_activations import NameActivations
from sqakd_fx.passes.propagate_shapes import PropagateShapes

_X = torch.randn(2, 4, 6, 6) * 3
_ROOT = math.sqrt(2 / math.pi)


class Function(nn.Module):
    """A function of a layer's output, and constants that an importer holds as buffers."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.layer, self.function, self.gate = nn.Conv2d(4, 4, 1), function, nn.Sigmoid()
        for name, value in (("three", 3.0), ("zero", 0.0), ("six", 6.0), ("point_five", 0.5)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x), self)


def _passes(x: Tensor) -> list:
    return [
        FoldConstants(),
        PropagateShapes((x,)),
        Canonicalize(),
        PropagateShapes((x,)),
        NameActivations(),
    ]


def _last_call(function: Callable[[Tensor, nn.Module], Tensor]) -> list[str]:
    graph_module = run_passes(traced(Function(function), _X), _passes(_X)).graph_module
    return calls(graph_module)[1:]


SPELT: dict[str, tuple[Callable[[Tensor, nn.Module], Tensor], str]] = {
    "x relu6(x + 3) / 6": (lambda x, m: x * F.relu6(x + 3) / 6, "hardswish"),
    "x (relu6(x + 3) / 6)": (lambda x, m: x * (F.relu6(x + 3.0) / 6.0), "hardswish"),
    "clamp(3 + x, 0, 6) x times a sixth": (
        lambda x, m: torch.clamp(3 + x, 0, 6) * x * (1 / 6),
        "hardswish",
    ),
    "hardtanh(x - -3) x a sixth": (
        lambda x, m: (1 / 6) * (F.hardtanh(x - -3, 0.0, 6.0) * x),
        "hardswish",
    ),
    "a module beside x": (lambda x, m: x * F.hardsigmoid(x), "hardswish"),
    "x six-th first": (lambda x, m: x / 6 * F.relu6(x + 3), "hardswish"),
    "buffers": (lambda x, m: x * (torch.clamp(x + m.three, 0, 6) / m.six), "hardswish"),
    "relu6(x + 3) / 6": (lambda x, m: F.relu6(x + 3) / 6, "hardsigmoid"),
    "clamp times a sixth": (lambda x, m: torch.clamp(x + 3, 0, 6) * (1 / 6), "hardsigmoid"),
    "x sigmoid(x)": (lambda x, m: x * torch.sigmoid(x), "silu"),
    "sigmoid(x) in place times x": (lambda x, m: x.sigmoid().mul_(x), "silu"),
    "a sigmoid by a module": (lambda x, m: x * m.gate(x), "silu"),
    "half x (1 + erf)": (
        lambda x, m: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
        "gelu",
    ),
    "x (1 + erf) half": (
        lambda x, m: x * (torch.erf(x * (1 / math.sqrt(2))) + 1) * m.point_five,
        "gelu",
    ),
    "half x (1 + tanh), a power": (
        lambda x, m: 0.5 * x * (1 + torch.tanh(_ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
        "gelu",
    ),
    "half x (1 + tanh), products": (
        lambda x, m: x * 0.5 * (1 + torch.tanh((x + 0.044715 * x * x * x) * _ROOT)),
        "gelu",
    ),
}


@pytest.mark.parametrize(("function", "name"), SPELT.values(), ids=SPELT)
def test_a_function_that_is_spelt_out_is_called_by_its_name(
    function: Callable[[Tensor, nn.Module], Tensor], name: str
) -> None:
    assert _last_call(function) == [name]
    before_and_after(Function(function), _X, *_passes(_X))  # the values stay the same


@pytest.mark.parametrize(("function", "name"), SPELT.values(), ids=SPELT)
def test_the_argument_may_come_from_a_module(
    function: Callable[[Tensor, nn.Module], Tensor], name: str
) -> None:
    net = Function(function)
    net.layer = nn.BatchNorm2d(4).eval()
    graph_module = run_passes(traced(net, _X), _passes(_X)).graph_module
    assert calls(graph_module)[1:] == [name]


UNLIKE: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "a gate of another tensor": lambda x, m: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "a scaled gate": lambda x, m: x * torch.sigmoid(1.702 * x),
    "another divisor": lambda x, m: x * F.relu6(x + 3) / 5,
    "another shift": lambda x, m: x * F.relu6(x + 2) / 6,
    "another clip": lambda x, m: x * torch.clamp(x + 3, 0, 5) / 6,
    "one bound": lambda x, m: x * torch.clamp(x + 3, min=0) / 6,
    "another tensor": lambda x, m: (x + 1) * F.relu6(x + 3) / 6,
    "a divided number": lambda x, m: 6 / F.relu6(x + 3),
    "a square": lambda x, m: x * x * F.relu6(x + 3) / 6,
    "another root": lambda x, m: 0.5 * x * (1 + torch.erf(x / 1.5)),
    "a whole": lambda x, m: x * (1 + torch.erf(x / math.sqrt(2))),
    "another cube": lambda x, m: 0.5 * x * (1 + torch.tanh(_ROOT * (x + 0.05 * x**3))),
    "a fourth power": lambda x, m: 0.5 * x * (1 + torch.tanh(_ROOT * (x + 0.044715 * x**4))),
    "a quotient of tensors": lambda x, m: 6 * x / F.relu6(x + 3),
    "many factors": lambda x, m: x * x * x * x * x * x * F.relu6(x + 3) / 6,
    "a larger shape": lambda x, m: F.relu6(x + 3) / m.six.reshape(1, 1, 1, 1, 1),
    "whole numbers": lambda x, m: x.int() * torch.clamp(x.int() + 3, 0, 6) / 6,
}


@pytest.mark.parametrize("function", UNLIKE.values(), ids=UNLIKE)
def test_what_is_another_function_stays_as_it_is(
    function: Callable[[Tensor, nn.Module], Tensor],
) -> None:
    assert not {"hardswish", "hardsigmoid", "gelu", "silu"} & set(_last_call(function))


def test_parts_that_others_read_are_kept() -> None:
    def both(x: Tensor, m: nn.Module) -> Tensor:
        gate = F.relu6(x + 3) / 6
        return torch.cat([x * gate, gate], 1)

    assert _last_call(both) == ["hardsigmoid", "hardswish", "cat"]

    def gate_as_well(x: Tensor, m: nn.Module) -> Tensor:
        gate = torch.sigmoid(x)
        return torch.cat([x * gate, gate], 1)

    assert _last_call(gate_as_well) == ["sigmoid", "mul", "cat"]
