"""The teacher's outputs on disk: the same run, with the teacher asked once a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.errors import TrainingError
from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.keeping import Keeping
from sqakd_fx.training.loop import distil
from sqakd_fx.training.progress import Listener
from sqakd_fx.training.step_batches import EpochBatches, TrainingData

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)).mul(16).round().div(16)
"""Few binary digits, as the teacher's weights have: its outputs are exact wherever a row stands in a batch."""


def shuffled(epoch: int) -> list[tuple[Tensor]]:
    """Three batches of the same rows, in another order each epoch."""
    order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch))
    return [(ROWS[part],) for part in order.split(8)]


class Counting(nn.Module):
    """A teacher that counts its calls."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.calls = teacher, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.teacher(x)


def trained(
    folder: Path, *settings: str, data: EpochBatches = shuffled, resume: bool = False
) -> tuple[list[float], dict[str, Tensor], Counting]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(64).round_().div_(64)
    recipe = resolve_recipe("w4a4", settings=["steps=12", "checkpoint_steps=1", *settings])
    program = build_program(model, ROWS, recipe)
    calibrate(program.student, [(ROWS,)])
    teacher = Counting(program.teacher)
    losses: list[float] = []
    distil(
        program.student,
        teacher,
        TrainingData(data, 3),
        recipe,
        torch.device("cpu"),
        Keeping(folder / "checkpoints", folder / "teacher", resume),
        Listener(lambda report: losses.append(report.loss)),
    )
    return losses, program.student.state_dict(), teacher


def test_cached_outputs_give_the_same_run_and_the_teacher_sees_each_sample_once(
    tmp_path: Path,
) -> None:
    losses, state, teacher = trained(tmp_path / "plain")
    assert teacher.calls == 12
    again, cached, asked = trained(tmp_path / "cached", "cache_teacher=true")
    assert asked.calls == 3
    assert again == losses
    assert all(torch.equal(state[name], cached[name]) for name in state)


def test_a_run_that_stopped_goes_on_with_the_outputs_that_it_kept(tmp_path: Path) -> None:
    losses, whole, _ = trained(tmp_path / "whole", "cache_teacher=true")

    def stops(epoch: int) -> list[tuple[Tensor]]:
        if epoch == 2:
            raise KeyboardInterrupt
        return shuffled(epoch)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "part", "cache_teacher=true", data=stops)
    rest, resumed, teacher = trained(tmp_path / "part", "cache_teacher=true", resume=True)
    assert teacher.calls == 1  # to learn the form of its output
    assert rest == losses[6:]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    _, whole, _ = trained(tmp_path, "cache_teacher=true")
    first = min((tmp_path / "teacher").iterdir())
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for newer in sorted((tmp_path / "checkpoints").iterdir()):
        newer.unlink()
    _, again, teacher = trained(tmp_path, "cache_teacher=true")
    assert teacher.calls == 3
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_another_teacher_does_not_get_outputs_of_the_first(tmp_path: Path) -> None:
    trained(tmp_path, "cache_teacher=true")
    _, _, other = trained(tmp_path, "cache_teacher=true", "precision='bf16'")
    assert other.calls == 3


def test_augmented_data_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def augmented(epoch: int) -> list[tuple[Tensor]]:
        return [(x + epoch,) for (x,) in shuffled(epoch)]

    with pytest.raises(TrainingError, match=r"at most 32.*augmented.*cache_teacher"):
        trained(tmp_path, "cache_teacher=true", data=augmented)


def test_a_loss_on_inner_features_says_that_nothing_is_cached(tmp_path: Path) -> None:
    notes: list[str] = []
    recipe = resolve_recipe(
        "w4a4", settings=["steps=2", "cache_teacher=true", "feature_weight=0.1"]
    )
    program = build_program(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), ROWS, recipe
    )
    calibrate(program.student, [(ROWS,)])
    distil(
        program.student,
        program.teacher,
        TrainingData(shuffled, 3),
        recipe,
        torch.device("cpu"),
        Keeping(teacher_outputs=tmp_path),
        Listener(on_note=notes.append),
    )
    assert any("cache_teacher has no effect" in note for note in notes)
    assert not list(tmp_path.iterdir())
