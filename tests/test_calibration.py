"""Calibration: no grid for what is not finite, and the layer that holds it is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.calibrate import calibrate
from sqakd_fx.errors import NotFiniteError, TrainingError
from sqakd_fx.families import FAMILIES
from sqakd_fx.initialise import mse_optimal
from sqakd_fx.program import build_program
from sqakd_fx.quantizer import Quantizer
from sqakd_fx.recipe import resolve_recipe

BAD = [float("nan"), float("inf"), float("-inf")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
        )
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


def calibrated(model: nn.Module, images: Tensor) -> None:
    program = build_program(model.eval(), (torch.zeros(2, 3, 8, 8),), {}, resolve_recipe("w4a4"))
    calibrate(program.student, [(torch.ones(2, 3, 8, 8),), (images,)])


@pytest.mark.parametrize("value", BAD)
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    model = Net()
    with torch.no_grad():
        model.body[3].weight[1, 2, 0, 1] = value
    with pytest.raises(TrainingError, match=r"^the weight body\.3\.weight holds NaN or infinity"):
        calibrated(model, torch.ones(2, 3, 8, 8))


@pytest.mark.parametrize("value", BAD)
def test_calibration_data_that_is_not_finite_is_refused_by_the_inputs_name(value: float) -> None:
    images = torch.ones(2, 3, 8, 8)
    images[1, 2, 6, 5] = value
    with pytest.raises(TrainingError, match=r"^the calibration data for the input x holds NaN"):
        calibrated(Net(), images)


@pytest.mark.parametrize("value", BAD)
def test_a_layer_that_makes_what_is_not_finite_is_named(value: float) -> None:
    model = Net()
    with torch.no_grad():
        model.body[3].bias[2] = value
    with pytest.raises(TrainingError, match=r"^the output of body\.3 on the calibration data"):
        calibrated(model, torch.ones(2, 3, 8, 8))


@pytest.mark.parametrize("method", ["paper", "minmax", "percentile", "mse"])
@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_quantizer_starts_on_what_is_not_finite(family: str, role: str, method: str) -> None:
    for value in (*BAD, 1e300):  # the last one is infinite in float32
        made = Quantizer(family, role, 4)
        with pytest.raises(NotFiniteError):
            made.initialise(torch.tensor([[1.0, value, -2.0]], dtype=torch.float64), method)
        assert not made.enabled


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_mse_search_finds_what_trying_every_candidate_finds(bits: int) -> None:
    """24 ranges from the whole tensor down to a twentieth of it, tried in float64 on every value."""
    weight = torch.randn(8, 1200, generator=torch.Generator().manual_seed(0)) ** 3
    levels = Quantizer("lsq", "weight", bits, channels=8, axis=0).levels
    rows, largest = weight.double(), weight.double().abs().amax(dim=1, keepdim=True)

    def error(clip: Tensor) -> Tensor:
        scale = clip / levels.magnitude
        q = torch.round(rows / scale + levels.half)
        q = q.clamp(levels.lowest, levels.lowest + levels.span)
        return ((q - levels.half) * scale - rows).square().mean(dim=1)

    ratios = torch.logspace(0, -1.3, 24, dtype=torch.float64)
    least = torch.stack([error(ratio * largest) for ratio in ratios]).amin(dim=0)
    found = error(mse_optimal(weight, levels).upper.double().reshape(-1, 1))
    assert (found >= 0.999999 * least).all()
    assert found.sum() <= 1.005 * least.sum()
