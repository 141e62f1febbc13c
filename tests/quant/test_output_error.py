"""What an error of one value costs the outputs of its layer, held against the outputs themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sqakd_fx.ir.op_table import TABLE
from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.input_statistics import input_statistics
from sqakd_fx.quant.output_error import mean_error, weight_importance
from sqakd_fx.quant.quantizer import quantizers_of

X = torch.randn(32, 6, 8, 8, generator=torch.Generator().manual_seed(0))
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: nn.Conv2d(6, 4, 3),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 1),
    "grouped transposed": lambda: nn.ConvTranspose2d(6, 4, 1, groups=2),
    "linear": lambda: nn.Linear(8, 4),
}


def student_of(layer: nn.Module) -> tuple[fx.GraphModule, fx.Node, Any]:
    settings = {"weight_bits": 4, "activation_bits": 4, "first_last": "same"}
    student = build_program(layer.eval(), X[:2], settings).student
    (node,) = [n for n in student.graph.nodes if "layer" in n.meta]
    return student, node, TABLE[node.target.__name__]  # type: ignore[union-attr]


def channel_axis(name: str) -> int:
    return -1 if name == "linear" else 1


def uneven(name: str) -> Tensor:
    """Values of independent channels, the largest a hundred times the smallest."""
    sizes = torch.logspace(-1, 1, X.shape[channel_axis(name)])
    return X * (sizes if name == "linear" else sizes[:, None, None])


def energy(name: str, output: Tensor) -> float:
    """E[y²] of each output channel, summed."""
    return float(output.movedim(channel_axis(name), 0).flatten(1).square().mean(1).sum())


@pytest.mark.parametrize("name", LAYERS)
def test_errors_of_a_weight_cost_what_their_importance_says(name: str) -> None:
    torch.manual_seed(0)
    layer: Any = LAYERS[name]()
    student, node, op = student_of(layer)
    x = uneven(name)
    importance = weight_importance(node, op, layer.weight, input_statistics(student, [(x,)]))
    assert importance is not None
    error = torch.randn_like(layer.weight) / 10
    with torch.no_grad():
        before = layer(x)
        layer.weight += error
        change = layer(x) - before
    assert energy(name, change) == pytest.approx(
        float((importance * error.square()).sum()), rel=0.15
    )


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_error_of_an_output_follows_from_the_means_of_its_inputs(name: str) -> None:
    torch.manual_seed(0)
    layer: Any = LAYERS[name]()
    student, node, op = student_of(layer)
    x = uneven(name) + 1
    error = torch.randn_like(layer.weight) / 10
    mean = input_statistics(student, [(x,)])[node.name].mean
    with torch.no_grad():
        before = layer(x)
        layer.weight += error
        change = (layer(x) - before).movedim(channel_axis(name), 0).flatten(1).mean(1)
    found = mean_error(node, op, error, mean)
    assert torch.allclose(found, change, atol=0.1 * float(x.std()))


class Outlier(nn.Module):
    """A channel that is a hundred times as large as the others, and counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        with torch.no_grad():
            self.fc.weight[:, 0] = 1e-4

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_ranges_by_the_output_clip_what_counts_for_nothing() -> None:
    x = X.clone()
    x[..., 0] *= 100
    errors, ranges = {}, {}
    for method in ("mse", "output"):
        settings = {"weight_bits": 8, "activation_bits": 4, "first_last": "same"}
        torch.manual_seed(0)
        program = build_program(Outlier().eval(), X[:2], settings)
        calibrate(program.student, [(x,)], method=method)
        with torch.no_grad():
            errors[method] = float((program.student(x) - program.teacher(x)).square().mean())
        quantizers = quantizers_of(program.student).values()
        (activation,) = [q for q in quantizers if q.role == "activation"]
        ranges[method] = float(activation.grid().scale)
    assert ranges["output"] < ranges["mse"] / 4
    assert errors["output"] < 0.7 * errors["mse"]
