"""Mean outputs of quantized layers before and after the correction of their biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.errors import PassError
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.correct_bias import CorrectBias
from sqakd_fx.program import Program, build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.input_statistics import input_statistics
from sqakd_fx.recipe.resolution import resolve_recipe

X = torch.randn(64, 4, 10, 10, generator=torch.Generator().manual_seed(0)) + 2


class Layers(nn.Module):
    """One layer of each kind in front of an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.conv, self.grouped = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2)
        self.normed = nn.Conv2d(4, 6, 3)
        self.fc, self.bare = nn.Linear(10, 6), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Any:
        return {
            "conv": self.conv(x),
            "grouped": self.grouped(x),
            "normed": self.norm(self.normed(x)),
            "fc": self.fc(x),
            "bare": self.bare(x),
        }


FLOAT = 'override=[{match="*", float="activations"}]'


def student(*settings: str) -> tuple[Program, dict[str, Tensor]]:
    """A calibrated student with weights of two bits, and the mean of what each layer reads."""
    torch.manual_seed(0)
    recipe = resolve_recipe("w2a8", settings=["first_last=same", *settings])
    program = build_program(Layers().eval(), X[:2], recipe)
    means = {name: one.mean for name, one in input_statistics(program.student, [(X,)]).items()}
    calibrate(program.student, [(X,)])
    return program, means


def mean_errors(program: Program) -> dict[str, float]:
    """How far the mean of each output channel is from float, over the deviation of the output."""
    with torch.no_grad():
        exact, got = program.teacher(X), program.student(X)
    errors = {}
    for name, wanted in exact.items():
        channel = 1 if wanted.ndim == 4 and name not in ("fc", "bare") else 3
        axes = [axis for axis in range(4) if axis != channel]
        error = (got[name] - wanted).mean(axes).abs().max()
        errors[name] = float(error / wanted.std())
    return errors


@pytest.mark.parametrize("setting", ["batch_norm=absorb", "batch_norm=fold", FLOAT])
def test_means_of_outputs_come_back(setting: str) -> None:
    """Of layers that read codes, and of those that read floats with weights in codes."""
    program, means = student(setting)
    before = mean_errors(program)
    code = program.student.code
    result = run_passes(program.student, [CorrectBias(means)])
    after = mean_errors(program)
    for name in ("conv", "grouped", "normed", "fc"):
        assert before[name] > 0.02, name
        assert after[name] < before[name] / 4, name
    assert program.student.code == code
    (note,) = [note for note in result.log[-1].notes if "bias" in note.reason]
    assert note.reason.endswith("it has no bias")
    assert after["bare"] == before["bare"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.fc(x)))


def test_a_bias_that_is_used_twice_stays() -> None:
    program = build_program(Twice().eval(), X[:2], "w4a8")
    calibrate(program.student, [(X,)])
    bias = program.student.get_parameter("fc.bias").clone()
    means = {name: torch.ones(10) for name in ("fc", "fc_1")}
    result = run_passes(program.student, [CorrectBias(means)])
    assert torch.equal(program.student.get_parameter("fc.bias"), bias)
    assert all("used more than once" in note.reason for note in result.log[-1].notes)
    assert not result.log[-1].changed


def test_a_student_without_ranges_is_refused() -> None:
    program = build_program(Twice().eval(), X[:2], "w4a8")
    with pytest.raises(PassError, match="calibrate the student first"):
        run_passes(program.student, [CorrectBias({})])


def test_a_layer_that_no_data_was_seen_at_stays() -> None:
    program, _ = student()
    result = run_passes(program.student, [CorrectBias({})])
    assert not result.log[-1].changed
    assert {note.reason.rpartition(": ")[2] for note in result.log[-1].notes} == {
        "no data was seen there"
    }
