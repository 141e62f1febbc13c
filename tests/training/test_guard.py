"""Training never ends worse than it began, and a destroyed student is no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.errors import TrainingError
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.guard import Judge, Judged, has_lost, refuse_destroyed

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(400, 12, generator=GENERATOR)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5))


class Boxes(nn.Module):
    """Four numbers for each of nine places, far from zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(12, 48), nn.Linear(48, 36)

    def forward(self, x: Tensor) -> Tensor:
        return 20 + 5 * self.head(torch.relu(self.body(x))).view(-1, 9, 4)


def run(model: nn.Module, folder: Path, **settings: Any) -> Any:
    values = {"preset": "w4a4", "batch_size": 64, "steps": 40} | settings
    return sqakd_fx.quantize(model, ROWS, example_inputs=ROWS[:2], recipe=values, out=folder)


DESTROYING = {
    "a learning rate of 10": {"learning_rate": 10.0, "optimizer": "sgd"},
    "a rate of ranges of 10000": {"quantizer_learning_rate": 1e4},
    "one bit at a rate of 3": {"preset": "w1a1", "learning_rate": 3.0, "first_last": "same"},
}


@pytest.mark.parametrize("case", DESTROYING)
def test_a_destroyed_student_is_an_error_and_no_file(case: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"learning_rate|more bits"):
        run(classifier(), tmp_path / "out", **DESTROYING[case])
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_training_that_loses_leaves_the_calibrated_student(tmp_path: Path) -> None:
    calibrated = run(classifier(), tmp_path / "a", preset="w8a8", steps=0)
    trained = run(classifier(), tmp_path / "b", preset="w8a8", steps=12, learning_rate=0.05)
    report = trained.report
    assert any(note.startswith("training lost") for note in report["training_notes"])
    assert report["after_training"] == report["before_training"]
    ours, theirs = (r.student.state_dict() for r in (trained, calibrated))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_boxes_come_nearer_with_the_default_loss(tmp_path: Path) -> None:
    report = run(Boxes(), tmp_path / "out", steps=60, first_last="same").report
    before, after = report["before_training"], report["after_training"]
    assert after["agreement"] > before["agreement"]
    assert report["outputs"][0]["nature"] == "values"


class Around(nn.Module):
    """Values near 100 that differ from sample to sample by so much."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        return 100 + self.spread * torch.tanh(x[:, :3])


@pytest.mark.parametrize(("spread", "constant"), [(10.0, True), (1.0, True), (0.01, False)])
def test_a_constant_student_is_one_whose_teacher_differs_by_what_codes_can_show(
    spread: float, constant: bool
) -> None:
    recipe = resolve_recipe("w8a8", loss="mse")
    judge = Judge([(ROWS[:32],)], Around(spread), recipe, torch.device("cpu"))
    assert judge(torch.fx.symbolic_trace(Around(0.0))).is_constant is constant
    assert not judge(torch.fx.symbolic_trace(Around(spread))).is_constant


def judged(agreement: float, loss: float = 1.0, samples: int = 256) -> Judged:
    return Judged(agreement, loss, False, samples)


def test_a_loss_within_noise_is_none_unless_both_measures_say_so() -> None:
    assert not has_lost(judged(0.95), judged(0.94, loss=0.9))
    assert has_lost(judged(0.95), judged(0.94, loss=1.1))
    assert has_lost(judged(0.95), judged(0.80, loss=0.9))
    assert not has_lost(judged(0.95), judged(0.96, loss=1.1))


def test_far_below_calibration_is_destroyed() -> None:
    recipe = resolve_recipe("w4a4")
    refuse_destroyed(judged(0.95), judged(0.6), recipe)
    for agreement in (0.3, -4.0, float("nan")):
        with pytest.raises(TrainingError, match="destroyed"):
            refuse_destroyed(judged(0.95), judged(agreement), recipe)
    refuse_destroyed(judged(0.95), judged(0.3), resolve_recipe("w4a4", labels=1.0))


def test_one_sample_or_a_lower_loss_proves_no_destruction() -> None:
    recipe = resolve_recipe("w8a8")
    refuse_destroyed(judged(1.0, samples=1), judged(0.0, loss=1.1, samples=1), recipe)
    assert has_lost(judged(1.0, samples=1), judged(0.0, loss=1.1, samples=1))
    refuse_destroyed(judged(1.0), judged(0.0, loss=0.9), recipe)
    assert has_lost(judged(1.0), judged(0.0, loss=0.9))


def test_outputs_smaller_than_a_step_of_training_are_told() -> None:
    recipe = resolve_recipe("w8a8")
    tiny = Judged(-4.0, 1.0, True, 8, largest=1e-9)
    with pytest.raises(TrainingError, match=r"outputs are at most 1e-09, .*: load its trained"):
        refuse_destroyed(judged(0.9), tiny, recipe)
    judge = Judge([(ROWS[:32],)], Around(1.0), recipe, torch.device("cpu"))
    assert 100 < judge(torch.fx.symbolic_trace(Around(0.0))).largest < 101
