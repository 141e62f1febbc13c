"""Channels of zero weights give their bias: where that is a tie, file and trained graph round it alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.passes.lower_to_integer.constant_channels import off_ties
from sqakd_fx.passes.lower_to_integer.values import Layer
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.grid import Grid, encode
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.validation.validate import validate

IMAGES = torch.rand(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    """Half of the gates have no weights, as in networks whose channels died: they are 0.5."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate, self.norm = nn.Conv2d(6, 6, 3, padding=1), layer, norm
        self.last = nn.Conv2d(6, 4, 1)
        with torch.no_grad():
            layer.weight *= 100.0  # other gates are 1, so that the step is 1 / 255
            layer.weight[::2] = 0
            if layer.bias is not None:
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        read = x.mean((2, 3)) if isinstance(self.gate, nn.Linear) else x
        gate = self.gate(read)
        gate = (gate if self.norm is None else self.norm(gate)) / 6 + 0.5
        gate = gate.clamp(0, 1)  # a hard-sigmoid as importers write it
        return self.last(x * (gate[:, :, None, None] if gate.ndim == 2 else gate))  # type: ignore[no-any-return]


NETWORKS = {
    "convolution": lambda: Gated(nn.Conv2d(6, 6, 1)),
    "depthwise": lambda: Gated(nn.Conv2d(6, 6, 3, padding=1, groups=6)),
    "linear": lambda: Gated(nn.Linear(6, 6)),
    "BatchNorm": lambda: Gated(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize("factor", [1.17, 1.68])
@pytest.mark.parametrize("batch_norm", ["fold", "absorb"])
@pytest.mark.parametrize("network", NETWORKS)
def test_gates_of_channels_that_died_are_the_same_in_the_file(
    network: str, batch_norm: str, factor: float, tmp_path: Path
) -> None:
    """At these factors of the inputs, rounding falls on the two sides of a tie."""
    images = factor * IMAGES
    recipe = resolve_recipe("w8a8", batch_norm=batch_norm, first_last="8bit")
    program = build_program(NETWORKS[network]().eval(), images, recipe)
    calibrate(program.student, [(images,)], method="minmax")
    lowered = lower(program.student).graph_module
    export(program, lowered, tmp_path / "model.onnx")
    checked = validate(program.student, lowered, tmp_path / "model.onnx", [(images,)])
    assert checked.failures == ()


def _layer(bias: list[float], weight: Tensor, unit: float) -> Layer:
    codes = torch.tensor(bias, dtype=torch.float64).div(unit).round().to(torch.int32)
    graph = torch.fx.Graph()
    return Layer(graph.placeholder("x"), None, (), (), weight, None, torch.tensor(unit), codes)  # type: ignore[arg-type]


def test_only_biases_on_ties_of_constant_channels_move() -> None:
    unit, grid = 1e-7, Grid(torch.tensor(1 / 255), 0, 0, 255, 8)
    weight = torch.tensor([[0, 0], [0, 0], [0, 1]], dtype=torch.int8)
    layer = _layer([0.5, 0.31, 0.5], weight, unit)
    assert layer.bias is not None
    found = off_ties(layer, grid).bias
    assert found is not None
    assert found[1:].tolist() == layer.bias[1:].tolist()
    value = layer.bias[:1].float() * unit
    assert float(found[0]) * unit * 255 == pytest.approx(float(encode(value, grid)), abs=1e-4)
