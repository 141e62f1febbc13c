"""The samples on which the file is farthest from the float model are kept, over all batches."""

from __future__ import annotations

import torch

from sqakd_fx.frontend.output_kinds import OutputKind
from sqakd_fx.results.farthest import Farthest


def kind(axis: int | None) -> OutputKind:
    nature, loss = ("classes", "kl") if axis is not None else ("values", "mse")
    return OutputKind("logits", "logits", 0, (2, 4), nature, axis, loss, "a test")  # type: ignore[arg-type]


def test_the_index_counts_over_the_batches_and_the_largest_error_comes_first() -> None:
    far = Farthest(kind(None))
    wanted = torch.ones(20, 4)
    got = wanted.clone()
    got[13] += 1
    got[17] += 0.5
    for batch in (slice(0, 10), slice(10, 20)):
        far.add(got[batch], wanted[batch])
    assert [one.index for one in far.samples][:2] == [13, 17]
    assert far.samples[0].relative_error == 1
    assert far.samples[0].changed is None
    assert len(far.samples) <= 8


def test_a_changed_prediction_comes_before_a_larger_error() -> None:
    far = Farthest(kind(1))
    wanted = torch.tensor([[1.0, 0.9, 0, 0], [1, 0, 0, 0]])
    far.add(torch.tensor([[0.9, 1.0, 0, 0], [9, 0, 0, 0]]), wanted)
    first, second = far.samples
    assert (first.index, first.changed, second.changed) == (0, 1.0, 0.0)
    values = dict(zip(first.positions, zip(first.float_values, first.values)))
    assert {at: tuple(round(x, 3) for x in both) for at, both in values.items()}[1] == (0.9, 1.0)


def test_an_output_without_axes_or_values_is_left_out() -> None:
    far = Farthest(kind(None))
    far.add(torch.tensor(1.0), torch.tensor(2.0))
    far.add(torch.zeros(0, 4), torch.zeros(0, 4))
    assert far.samples == []
