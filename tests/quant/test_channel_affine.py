"""A tensor that a convolution reads at fewer bits than others has a learned threshold for each channel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import distilled
from torch import Tensor, nn

from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.batch_norm import AffineBatchNorm
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.validation.validate import validate


class Stream(nn.Module):
    """A residual stream over 1, 2 or 3 axes, which two convolutions and a sum read."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.stem, self.head = conv(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.one, self.other = conv(8, 8, 3, padding=1), conv(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.one(x)) + self.other(x)
        return self.head(x.flatten(2).mean(2))  # type: ignore[no-any-return]


class Rows(nn.Module):
    """A residual stream that a linear layer reads, whose channels are the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + torch.relu(self.inner(x)))  # type: ignore[no-any-return]


def calibrated(
    model: nn.Module, inputs: Tensor, *settings: str, bits: str = "w1a1"
) -> tuple[Program, Recipe]:
    recipe = resolve_recipe(bits, settings=settings)
    program = build_program(model.eval(), inputs, recipe)
    calibrate(program.student, [(inputs,)])
    return program, recipe


def affines(program: Program) -> dict[str, AffineBatchNorm]:
    modules = program.student.named_modules()
    return {name: m for name, m in modules if isinstance(m, AffineBatchNorm)}


def move(program: Program) -> None:
    """Shifts, and scales of both signs, one of them 0."""
    torch.manual_seed(3)
    for module in affines(program).values():
        nn.init.normal_(module.batch_norm.weight, 0.8, 0.8)
        nn.init.normal_(module.batch_norm.bias, 0, 0.3)
        with torch.no_grad():
            module.batch_norm.weight[0] = 0.0


def test_what_is_read_at_fewer_bits_than_it_has_gets_them(
    residual_net: nn.Module, images: Tensor
) -> None:
    def names(*settings: str, bits: str = "w1a1") -> set[str]:
        return set(affines(calibrated(residual_net, images, *settings, bits=bits)[0]))

    blocks = {"max_pool2d_affine", "layers.0.relu_2_affine"}
    assert names() == names("activation_affine=channel", bits="w4a4") == blocks
    assert names("activation_affine=none") == names(bits="w2a2") == set()


def test_a_layer_whose_channels_are_the_last_axis_goes_without() -> None:
    program, _ = calibrated(Rows(), torch.randn(16, 6))
    assert [m.bits for n, m in program.student.named_modules() if n.endswith("_1bit")] == [1]
    assert affines(program) == {}


def test_they_change_nothing_at_the_start(residual_net: nn.Module, images: Tensor) -> None:
    plain, _ = calibrated(residual_net, images, "activation_affine=none")
    program, _ = calibrated(residual_net, images)
    assert torch.equal(program.student(images), plain.student(images))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_codes_are_those_of_the_formula_in_float64(axes: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, *[9] * axes)
    program, _ = calibrated(Stream(axes), x)
    move(program)
    (affine,) = affines(program).values()
    (narrow,) = (m for n, m in program.student.named_modules() if n.endswith("_1bit"))
    assert isinstance(narrow, Quantizer)
    seen: list[tuple[Tensor, Tensor]] = []
    affine.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    program.student(x)
    ((stream, shifted),) = seen
    a, b = (p.double().reshape(-1, *[1] * axes) for p in affine.batch_norm.parameters())
    share = (a * stream.double() + b) / narrow.grid().scale.double()
    clear = (share - 0.5).abs() > 1e-4  # the shift is a whole number of the product's scale
    assert clear.float().mean() > 0.99
    codes = narrow.codes(shifted)
    assert torch.equal(codes[clear], (share > 0.5).int()[clear])
    assert codes.unique().tolist() == [0, 1]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("bits", ["w1a1", "w2a2"])
@pytest.mark.parametrize("profile", ["container", "packed"])
def test_they_are_exported_code_by_code(axes: int, bits: str, profile: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, *[9] * axes)
    settings = ("activation_affine=channel", f"profile={profile}")
    program, _ = calibrated(Stream(axes), x, *settings, bits=bits)
    move(program)
    lowered = lower(program.student).graph_module
    export(program, lowered, tmp_path / "model.onnx")
    checked = validate(program.student, lowered, tmp_path / "model.onnx", [(x,)])
    assert checked.failures == ()
    assert checked.fusion.float_heavy == ()
    assert all(t.largest == 0 for runtime in checked.runtimes for t in runtime.tensors)


def test_training_moves_them_channel_by_channel(residual_net: nn.Module, images: Tensor) -> None:
    program, recipe = calibrated(residual_net, images, "steps=4")
    distilled(program, images, recipe)
    for module in affines(program).values():
        for learned in module.batch_norm.parameters():
            assert learned.detach().unique().numel() > 1
