"""Which statistics a student learns in training, and which stay the float model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.ir.modes import evaluation_mode, set_training
from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.loop import distil
from sqakd_fx.training.step_batches import TrainingData


class PreActivation(nn.Module):
    """Normalizations that no layer in front of them takes in, whose statistics are not those of the data."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), norm(8), nn.Linear(8, 4)
        self.first = nn.BatchNorm2d(3)
        with torch.no_grad():
            for one in (self.norm, self.first):
                one.running_mean += 0.5  # type: ignore[operator]
                one.running_var *= 4.0  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.conv(self.first(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def _with_statistics(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


def _statistics_of(bits: str, norm: Any, *settings: str) -> tuple[dict[str, Tensor], nn.Module]:
    """What a run of a few steps, judged on held-out samples as well, leaves of the running statistics."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8)
    recipe = resolve_recipe(bits, settings=["steps=4", "compile=never", *settings])
    program = build_program(PreActivation(norm).eval(), images, recipe)
    calibrate(program.student, [(images,)])
    distil(
        program.student,
        program.teacher,
        TrainingData(lambda epoch: [(images,)], 1, [(images,)]),
        recipe,
        torch.device("cpu"),
    )
    kept = program.student.state_dict()
    return {name: kept[name] for name in kept if "running" in name}, program.student


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, _with_statistics], ids=["batch", "instance"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4"])
def test_statistics_that_cannot_be_folded_stay_the_float_models(bits: str, norm: Any) -> None:
    kept, student = _statistics_of(bits, norm)
    assert kept
    for name, value in kept.items():
        wanted = 0.5 if name.endswith("mean") else 4.0
        assert torch.equal(value, torch.full_like(value, wanted)), name
    assert not any(module.training for module in student.modules())


def test_batch_norm_that_is_to_be_absorbed_learns_statistics() -> None:
    kept, _ = _statistics_of("w2a2", nn.BatchNorm2d)
    assert all(value.std() > 0 for value in kept.values())


def test_instance_norm_keeps_its_statistics_where_batch_norm_learns_them() -> None:
    kept, _ = _statistics_of("w2a2", _with_statistics)
    assert torch.equal(kept["norm.running_mean"], torch.full((8,), 0.5))
    assert kept["first.running_mean"].std() > 0


def test_judging_a_student_leaves_the_mode_of_each_module() -> None:
    net = PreActivation(nn.BatchNorm2d)
    set_training(net, live_batch_norm=False)
    with evaluation_mode(net):
        assert not any(module.training for module in net.modules())
    assert net.training
    assert net.conv.training
    assert not net.norm.training
