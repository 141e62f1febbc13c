"""The two ends of an activation's range are chosen apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.quant.ranges import Range
from sqakd_fx.recipe.resolution import resolve_recipe


def _values() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=draw)
    return {
        "behind SiLU": F.silu(4 * normal),
        "behind GELU": F.gelu(3 * normal),
        "mostly negative": torch.minimum(-10 * normal.abs(), torch.tensor(0.0)) + 2.0,
        "normal": normal,
    }


def _error(x: np.ndarray, lower: float, upper: float) -> float:
    """Root of the mean squared error on a grid of 256 codes with a zero, in float64."""
    step = (upper - lower) / 255
    zero = np.clip(np.round(-lower / step), 0, 255)
    codes = np.clip(np.round(x / step) + zero, 0, 255)
    return float(np.sqrt(np.mean(((codes - zero) * step - x) ** 2)))


@pytest.mark.parametrize("family", ["lsq", "lsq+", "minmax"])
@pytest.mark.parametrize("name", _values())
def test_the_range_is_near_the_best_of_a_finer_search(name: str, family: str) -> None:
    x = _values()[name]
    quantizer = Quantizer(family, "activation", 8)
    quantizer.initialize(x, "mse")
    got = float((quantizer(x) - x).double().square().mean().sqrt())
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    finer = np.geomspace(0.05, 1.0, 60)
    best = min(_error(x.double().numpy(), a * low, b * high) for a in finer for b in finer[::3])
    assert got < 1.15 * best


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_values_of_both_signs_use_all_codes(bits: int) -> None:
    """Codes about zero would leave half of them unused."""
    x = _values()["behind SiLU"]
    quantizer = Quantizer("lsq", "activation", bits)
    quantizer.initialize(x, "mse")
    codes = quantizer.codes(x)
    assert int(codes.max()) - int(codes.min()) > 0.9 * (2**bits - 1)


def test_ends_that_are_nearly_as_far_from_zero_have_codes_about_it() -> None:
    quantizer = Quantizer("lsq", "activation", 8)
    quantizer.start_at(Range(torch.tensor(-4.1), torch.tensor(4.5)))
    assert quantizer.grid().zero_point == 128


@pytest.mark.parametrize("bits", [1, 2])
def test_few_codes_lie_about_zero(bits: int) -> None:
    quantizer = Quantizer("lsq", "activation", bits)
    quantizer.initialize(_values()["behind SiLU"], "mse")
    assert quantizer.grid().zero_point == 2 ** (bits - 1)


def test_signed_codes_lie_about_zero() -> None:
    quantizer = Quantizer("lsq", "activation", 8, signed=True)
    quantizer.initialize(_values()["mostly negative"], "mse")
    grid = quantizer.grid()
    assert (grid.qmin - grid.zero_point, grid.qmax - grid.zero_point) == (-128, 127)


def test_what_a_silu_makes_nothing_of_is_clipped() -> None:
    """Far below zero SiLU is 0: the codes are for the values that the output depends on."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        net[0].weight.mul_(20)
        net[0].bias.fill_(-10.0)  # type: ignore[union-attr]
    images = torch.randn(16, 3, 8, 8)
    lowest = float(net[0](images).detach().min())
    program = build_program(net, images, resolve_recipe("w8a8"))
    calibrate(program.student, [(images,)], method="output")
    quantizer = program.student.get_submodule("0.output_quantizer")
    assert isinstance(quantizer, Quantizer)
    grid = quantizer.grid()
    lower = float(grid.scale) * (grid.qmin - grid.zero_point)
    assert lowest < -20.0 < lower < -2.0
