"""Batches are counted so that small ones are not fewer samples than four each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx import stages
from sqakd_fx.ir.batches import first_batches, last_batches
from sqakd_fx.ir.outputs import largest_difference
from sqakd_fx.program import build_program

Batch = tuple[Tensor, ...]


def numbered(count: int, samples: int) -> list[Batch]:
    return [(torch.full((samples, 2), float(number)),) for number in range(count)]


def numbers(batches: list[Batch]) -> list[int]:
    return [int(x[0, 0]) for (x,) in batches]


@pytest.mark.parametrize(("samples", "drawn"), [(1, 8), (2, 4), (3, 3), (4, 2), (100, 2)])
def test_two_batches_have_eight_samples_or_more(samples: int, drawn: int) -> None:
    batches = numbered(20, samples)
    assert numbers(list(first_batches(batches, 2))) == list(range(drawn))
    assert numbers(last_batches(batches, 2)) == list(range(20 - drawn, 20))


def test_all_are_taken_where_there_are_not_so_many() -> None:
    batches = numbered(3, 1)
    assert numbers(list(first_batches(batches, 2))) == numbers(last_batches(batches, 2))


def test_no_batch_is_drawn_beyond_those_that_are_wanted() -> None:
    drawn = []

    def draw() -> Iterator[Batch]:
        for number, batch in enumerate(numbered(9, 5)):
            drawn.append(number)
            yield batch

    assert len(list(first_batches(draw(), 3))) == 3
    assert drawn == [0, 1, 2]


def test_ranges_start_from_more_batches_where_each_is_one_sample() -> None:
    """The largest value is in the last sample that is seen."""
    torch.manual_seed(0)
    data = [torch.rand(1, 4) for _ in range(64)]
    data[-1] = torch.full((1, 4), 10.0)
    model = nn.Linear(4, 3).eval()
    fixed = {"initialization": "minmax", "first_last": "8bit", "held_out": 0}
    for batches, seen in ((16, True), (2, False)):
        recipe = {"preset": "w8a8", "calibration_batches": batches, **fixed}
        program = build_program(model, data[0], recipe)
        stages.calibrate(program, data)
        with torch.no_grad():
            apart = largest_difference([model(data[-1])], [program.student(data[-1])])
        assert (apart < 0.1) == seen
