"""Equalization and bias correction through the stages: the float model stays, the student starts elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.pipeline import quantize
from sqakd_fx.program import build_program
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.stages import calibrate

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Uneven(nn.Module):
    """Channels of sizes that differ by a factor of a thousand between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.fc = nn.Conv2d(16, 8, 3), nn.Linear(8, 4)
        sizes = torch.logspace(-1.5, 1.5, 16)
        with torch.no_grad():
            self.norm.weight.mul_(sizes)
            self.b.weight.div_(sizes[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))


def start(**settings: object) -> tuple[float, float]:
    """The student's distance from float, without quantizers and calibrated."""
    recipe = {"weight_bits": 4, "activation_bits": 4, "first_last": "same", **settings}
    program = build_program(Uneven().eval(), X[:2], recipe)
    calibrate(program, X)
    quantizers = quantizers_of(program.student).values()
    with torch.no_grad():
        wanted, calibrated = program.teacher(X), program.student(X)
        for quantizer in quantizers:
            quantizer.enabled = False
        exact = program.student(X)
    return tuple(float((y - wanted).norm() / wanted.norm()) for y in (exact, calibrated))  # type: ignore[return-value]


@pytest.mark.parametrize("batch_norm", ["absorb", "fold"])
@pytest.mark.parametrize("equalize", ["weights", "activations"])
def test_an_equalized_student_is_the_float_model_and_quantizes_better(
    equalize: str, batch_norm: str
) -> None:
    _, plain = start(batch_norm=batch_norm)
    exact, equalized = start(batch_norm=batch_norm, equalize=equalize)
    assert exact < 1e-5
    assert equalized < 0.7 * plain


def test_a_whole_run_exports_what_was_equalized(tmp_path: Path) -> None:
    result = quantize(
        Uneven().eval(),
        X,
        example_inputs=X[:2],
        recipe={
            "preset": "w4a4",
            "equalize": "activations",
            "bias_correction": True,
            "initialization": "output",
            "steps": 1,
        },
        out=tmp_path / "out",
    )
    assert result is not None
    assert not result.validation.failures
