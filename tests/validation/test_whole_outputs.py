"""Outputs from the same codes agree to float rounding, and predictions beyond ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sqakd_fx.validation.whole_outputs import Predictions, relative_error


def test_the_relative_error_is_that_of_numpy() -> None:
    got, wanted = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    a, b = got.numpy().astype(np.float64), wanted.numpy().astype(np.float64)
    assert relative_error(got, wanted) == pytest.approx(
        np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-9
    )


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_must_be_the_same(odd: float) -> None:
    wanted = torch.tensor([1.0, odd, 3.0])
    assert relative_error(wanted.clone(), wanted) == 0
    assert relative_error(torch.tensor([1.0, 2.0, 3.0]), wanted) == math.inf
    assert relative_error(torch.tensor([odd, 1.0, 3.0]), wanted) == math.inf


def test_whole_numbers_count_as_same_or_another() -> None:
    assert relative_error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert relative_error(torch.zeros(2, 3), torch.zeros(3, 2)) == math.inf


def scores(samples: int) -> torch.Tensor:
    return 10 * torch.randn(samples, 10, generator=torch.Generator().manual_seed(1))


def test_predictions_that_change_at_a_tie_are_the_same() -> None:
    wanted = scores(64)
    wanted[:, 1] = wanted.amax(1) + 1e-6
    got = wanted + 1e-3 * torch.randn(64, 10, generator=torch.Generator().manual_seed(2))
    found = Predictions({0: 1})
    found.add([got], [wanted])
    assert found.share < 1
    assert found.are_the_same


def test_predictions_that_change_beyond_the_rounding_are_not() -> None:
    wanted = scores(64)
    got = wanted.clone()
    got[0] = got[0].flip(0)
    got[0, 0] += 100
    found = Predictions({0: 1})
    found.add([got], [wanted])
    assert found.changed == 1
    assert not found.are_the_same


def test_one_of_many_predictions_may_change() -> None:
    wanted = scores(1000)
    got = wanted.clone()
    got[0] = got[0].roll(1)
    found = Predictions({0: 1})
    found.add([got], [wanted])
    assert (found.changed, found.decisions) == (1, 1000)
    assert found.are_the_same


def test_outputs_without_classes_have_no_predictions() -> None:
    found = Predictions({})
    found.add([torch.randn(4, 8)], [torch.randn(4, 8)])
    assert (found.decisions, found.share, found.are_the_same) == (0, 1.0, True)
