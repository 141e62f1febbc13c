"""Calibration: no grid for what is not finite, and the layer that holds it is named."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.errors import NotFiniteError, TrainingError
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.quant.init_ranges import mse_optimal
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.quant.sampling import spread_sample
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.validation.validate import validate

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
    program = build_program(model.eval(), torch.zeros(2, 3, 8, 8), resolve_recipe("w4a4"))
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
            made.initialize(torch.tensor([[1.0, value, -2.0]], dtype=torch.float64), method)
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


def error_of_every_range(values: Tensor, bits: int, largest: Tensor) -> Tensor:
    """Mean square error, in float64, of codes 0 ... 2^bits - 1 on [0, r largest] for 24 r from 1 to a twentieth."""
    flat = values.double().flatten()
    scales = torch.logspace(0, -1.3, 24, dtype=torch.float64) * largest / (2**bits - 1)
    codes = [torch.round(flat / scale).clamp(0, 2**bits - 1) for scale in scales]
    return torch.stack([(q * s - flat).square().mean() for q, s in zip(codes, scales)])


@pytest.mark.parametrize("size", [8, 13, 16, 56])
@pytest.mark.parametrize(("bits", "factor"), [(4, 1.1), (8, 2.0)])
def test_a_range_fits_the_whole_of_the_feature_maps(size: int, bits: int, factor: float) -> None:
    """What is at the left edge, beside the padding, is a tenth of the rest, and large values are rare: with 8 bits
    the best range is as wide as the few largest, of which a sample knows least."""
    images = torch.randn(32, 48, size, size, generator=torch.Generator().manual_seed(0)).square()
    images[..., 0] *= 0.1
    recipe = resolve_recipe(f"w8a{bits}", first_last="same")
    program = build_program(nn.Conv2d(48, 2, 1).eval(), images[:2], recipe)
    calibrate(program.student, [(images,)])
    quantizer = program.student.get_submodule("input_1.output_quantizer")
    assert isinstance(quantizer, Quantizer)
    errors = error_of_every_range(images, bits, images.max().double())
    scale = quantizer.grid().scale.double()
    codes = torch.round(images.double() / scale).clamp(0, 2**bits - 1)
    assert (codes * scale - images).square().mean() <= factor * errors.min()


@pytest.mark.parametrize(
    "shape", [(128, 64, 8, 8), (16, 64, 56, 56), (8, 197, 768), (3, 96, 13, 13, 13), (128, 512)]
)
def test_a_sample_meets_all_places_of_every_axis_alike(shape: tuple[int, ...]) -> None:
    for axis, size in enumerate(shape):
        place = torch.arange(size).reshape([-1 if k == axis else 1 for k in range(len(shape))])
        sample = spread_sample(place.expand(shape).reshape(1, -1), 1 << 15)
        times = torch.bincount(sample[0], minlength=size).double()
        assert times.max() <= 1.25 * times.mean() + 2
        assert times.min() >= 0.75 * times.mean() - 2


class ZeroMean(nn.Module):
    """The average of a normalized tensor: 0 but for rounding."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(4, 4), last)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", [nn.Identity(), nn.Conv2d(4, 4, 1, bias=False)], ids=str)
@pytest.mark.parametrize("family", ["lsq", "lsq+", "ewgs", "pact", "dorefa", "percentile"])
def test_an_average_of_rounding_gets_no_grid_of_rounding(last: nn.Module, family: str) -> None:
    torch.manual_seed(0)
    model, images = ZeroMean(last).eval(), torch.randn(4, 3, 11, 11)
    with torch.no_grad():
        normalized = model.body(images)
    peak = float(normalized.abs().max())
    noise = float(normalized.mean((2, 3)).abs().max())
    assert noise < 1e-6 * peak
    recipe = resolve_recipe("w4a4", activation_family=family)
    program = build_program(model, images, recipe)
    calibrate(program.student, [(images,)], method="minmax")
    quantizer = program.student.get_submodule("mean.output_quantizer")
    assert isinstance(quantizer, Quantizer)
    assert float(quantizer.grid().scale) >= peak / 2**16
    lowered = lower(program.student).graph_module
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(program, lowered, path)
        assert not validate(program.student, lowered, path, [(images,)]).failures


def test_a_small_average_keeps_its_own_grid() -> None:
    torch.manual_seed(0)
    model, images = Net(), torch.randn(4, 3, 8, 8)
    program = build_program(model.eval(), images, resolve_recipe("w8a8"))
    calibrate(program.student, [(images,)], method="minmax")
    quantizer = program.student.get_submodule("mean.output_quantizer")
    assert isinstance(quantizer, Quantizer)
    means = model.body(images).detach().mean((2, 3))
    width = float(means.max().clamp_min(0) - means.min().clamp_max(0))
    assert float(quantizer.grid().scale) == pytest.approx(width / 255, rel=0.02)
