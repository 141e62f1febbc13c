"""The training loop: parts of a batch, memory, divergence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.calibrate import calibrate
from sqakd_fx.distil import Batches, Distilled, distil
from sqakd_fx.errors import TrainingError
from sqakd_fx.program import build_program
from sqakd_fx.recipe import Recipe, resolve_recipe

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


class Hungry(nn.Module):
    """Raises as an allocator does where more than `most` samples come at once in training."""

    def __init__(self, net: nn.Module, most: int) -> None:
        super().__init__()
        self.net, self.most = net, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.net(x)  # type: ignore[no-any-return]


def trained(
    most: int = 99,
    *settings: str,
    data: Batches = lambda epoch: [(ROWS,)],
    checkpoints: Path | None = None,
    resume: bool = False,
) -> tuple[Distilled, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    recipe = resolve_recipe("w4a4", settings=["steps=6", "optimizer=sgd", *settings])
    program = build_program(model, (ROWS,), {}, recipe)
    calibrate(program.student, [(ROWS,)])
    student = Hungry(program.student, most)
    teacher = program.teacher
    done = distil(
        student,  # type: ignore[arg-type]
        teacher,
        data,
        recipe,
        steps_per_epoch=1,
        device=torch.device("cpu"),
        checkpoints=checkpoints,
        resume=resume,
    )
    return done, program.student.state_dict()


def test_a_batch_in_parts_gives_the_step_of_the_whole_batch() -> None:
    _, whole = trained()
    _, parts = trained(99, "accumulate=5")
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_a_batch_that_does_not_fit_is_divided_and_the_log_says_so() -> None:
    _, whole = trained()
    done, parts = trained(most=7)
    assert "4 parts" in done.notes[-1]
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_a_sample_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(TrainingError, match="batch_size"):
        trained(most=0)


def test_a_loss_that_is_not_finite_rolls_back_and_then_stops_with_a_name() -> None:
    with pytest.raises(TrainingError, match=r"not finite.*learning_rate"):
        trained(data=lambda epoch: [(ROWS * float("nan"),)])


def test_an_average_of_weights_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    _, whole = trained(99, "weight_average=0.9")
    batches = [(ROWS,)]

    def interrupted(epoch: int) -> list[tuple[Tensor]]:
        if epoch == 3:
            raise KeyboardInterrupt
        return batches

    settings = ["weight_average=0.9", "checkpoint_steps=1"]
    with pytest.raises(KeyboardInterrupt):
        trained(99, *settings, data=interrupted, checkpoints=tmp_path)
    _, resumed = trained(99, *settings, checkpoints=tmp_path, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Pull:
    """A craft that pulls one parameter towards 0 and counts what it is asked."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.calls: list[tuple[str, int, int]] = []

    def before_step(self, step: int, total: int) -> None:
        self.calls.append(("before", step, total))

    def penalty(self) -> Tensor:
        return 1000 * self.parameter.square().sum()

    def after_step(self, step: int, total: int) -> None:
        self.calls.append(("after", step, total))

    def finish(self) -> None:
        self.calls.append(("finish", -1, -1))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


def test_a_craft_acts_around_every_step_and_adds_to_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Pull] = []

    def only_pull(student: nn.Module, recipe: Recipe, total: int) -> list[Pull]:
        made.append(Pull(next(p for n, p in student.named_parameters() if n.endswith("bias"))))
        return made[-1:]

    monkeypatch.setattr("sqakd_fx.distil.low_bit_craft", only_pull)
    plain, _ = trained(99, "learning_rate=1e-4")
    around = [(when, step, 6) for step in range(6) for when in ("before", "after")]
    assert made[0].calls == [*around, ("finish", -1, -1)]
    assert plain.loss > 10
    parts, _ = trained(99, "learning_rate=1e-4", "accumulate=5")
    assert parts.loss == pytest.approx(plain.loss, rel=1e-5)
