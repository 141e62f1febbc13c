"""Weights that make up for one another's rounding: held against OBQ's formula, and against outputs of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.errors import PassError
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.compensate_rounding import CompensateRounding
from sqakd_fx.program import Program, build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.error_compensation import compensated
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.quant.second_moments import second_moments
from sqakd_fx.recipe.resolution import resolve_recipe

X = torch.randn(32, 4, 10, 10, generator=torch.Generator().manual_seed(0)).cumsum(3) / 2


class Layers(nn.Module):
    """One layer of each kind in front of an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2))
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, dilation=2)
        self.depthwise, self.normed = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 3)
        self.row, self.fc = nn.Conv1d(4, 6, 5, padding=2), nn.Linear(10, 6)
        self.back = nn.ConvTranspose2d(4, 6, 3)

    def forward(self, x: Tensor) -> Any:
        return {
            "conv": self.conv(x),
            "grouped": self.grouped(x),
            "depthwise": self.depthwise(x),
            "normed": self.norm(self.normed(x)),
            "row": self.row(x.flatten(2)),
            "fc": self.fc(x),
            "back": self.back(x),
        }


def calibrated(*settings: str) -> tuple[Program, dict[str, Tensor]]:
    """A calibrated student with weights of three bits, and the moments of what its layers read."""
    torch.manual_seed(0)
    recipe = resolve_recipe("w3a8", settings=["first_last=same", *settings])
    program = build_program(Layers().eval(), X[:2], recipe)
    moments = dict(second_moments(program.student, [(X[:16],), (X[16:],)]))
    calibrate(program.student, [(X,)])
    return program, moments


def weight_errors(program: Program) -> dict[str, float]:
    """By output, how far quantized weights alone put it from float."""
    for quantizer in quantizers_of(program.student).values():
        quantizer.enabled = quantizer.role == "weight"
    with torch.no_grad():
        exact, got = program.teacher(X), program.student(X)
    return {name: float((got[name] - exact[name]).norm()) for name in exact}


def test_the_moments_give_the_energy_of_each_layers_outputs() -> None:
    program, moments = calibrated()
    net = Layers()
    for name, layer in net.named_children():
        if name in ("norm", "back"):
            continue
        x = X.flatten(2) if name == "row" else X
        with torch.no_grad():
            layer.bias.zero_()
            outputs = layer(x).movedim(-1 if name == "fc" else 1, 0).flatten(1)
        moment = moments[name]
        rows = layer.weight.detach().reshape(len(moment), -1, moment.shape[1])
        energy = (torch.bmm(rows, moment) * rows).sum(2).flatten()
        tolerance = 0.1 if name in ("conv", "row", "grouped", "normed", "depthwise") else 1e-4
        torch.testing.assert_close(energy, outputs.square().mean(1), rtol=tolerance, atol=1e-3)
    assert "back" not in moments
    assert program.is_calibrated


def by_elimination(row: Tensor, moment: Tensor) -> Tensor:
    """OBQ in float64: round the next weight, spread its error, take its row and column out of H⁻¹."""
    order = moment.diagonal().argsort(descending=True)
    w, h = row.double()[order], moment.double()[order][:, order]
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(w), dtype=h.dtype))
    rounded = torch.empty_like(w)
    for at in range(len(w)):
        rounded[at] = torch.round(w[at])
        w = w - (w[at] - rounded[at]) / inverse[at, at] * inverse[:, at]
        inverse = inverse - inverse[:, at, None] * inverse[None, at] / inverse[at, at]
    return rounded[order.argsort()]


@pytest.mark.parametrize("size", [3, 70, 150])
def test_codes_are_those_of_the_formula(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    mixed = torch.randn(size, size, generator=generator)
    moment = mixed @ mixed.T / size + torch.eye(size)
    rows = 3 * torch.randn(5, size, generator=generator)
    targets = compensated(rows[None], moment[None], torch.round)[0]
    wanted = torch.stack([by_elimination(row, moment) for row in rows])
    assert float((targets.round() != wanted).float().mean()) <= 0.005  # float32 beside a tie


def test_layers_are_nearer_to_float_and_none_is_farther() -> None:
    program, moments = calibrated()
    before = weight_errors(program)
    for quantizer in quantizers_of(program.student).values():
        quantizer.enabled = True
    code = program.student.code
    result = run_passes(program.student, [CompensateRounding(moments)])
    after = weight_errors(program)
    for name in ("conv", "grouped", "normed", "row", "fc"):
        assert after[name] < 0.8 * before[name], name
    assert after["depthwise"] <= 1.01 * before["depthwise"]
    assert after["back"] == before["back"]
    assert program.student.code == code
    (note,) = [note for note in result.log[-1].notes if "back" in note.node]
    assert note.reason.endswith("what it multiplies was not seen")


def test_a_family_that_transforms_weights_keeps_the_nearest_codes() -> None:
    program, moments = calibrated("weight_family=dorefa")
    kept = {name: value.clone() for name, value in program.student.state_dict().items()}
    result = run_passes(program.student, [CompensateRounding(moments)])
    notes = [note for note in result.log[-1].notes if "nearest" in note.reason]
    assert len(notes) == 7
    assert all(
        torch.equal(value, kept[name]) for name, value in program.student.state_dict().items()
    )


def test_a_student_without_ranges_is_refused() -> None:
    program = build_program(Layers().eval(), X[:2], resolve_recipe("w3a8"))
    with pytest.raises(PassError, match="calibrate"):
        run_passes(program.student, [CompensateRounding({})])


def test_a_run_with_it_is_exported_and_validated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)
    )
    settings = {"preset": "w4a8", "rounding": "compensated", "steps": 2, "bias_correction": True}
    result = sqakd_fx.quantize(
        net.eval(),
        X.repeat(4, 1, 1, 1),
        example_inputs=X[:2],
        recipe=settings,
        out=tmp_path / "net",
    )
    assert not result.validation.failures
