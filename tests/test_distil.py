"""The training loop: parts of a batch, memory, divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.calibrate import calibrate
from sqakd_fx.distil import Distilled, distil
from sqakd_fx.errors import TrainingError
from sqakd_fx.program import build_program
from sqakd_fx.recipe import resolve_recipe

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
    most: int = 99, *settings: str, scale: float = 1.0
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
        lambda epoch: [(scale * ROWS,)],
        recipe,
        steps_per_epoch=1,
        device=torch.device("cpu"),
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
        trained(99, scale=float("nan"))
