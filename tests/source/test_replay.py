"""An iterator is given again from memory, and never fills it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sqakd_fx.errors import SourceError
from sqakd_fx.source.replay import Replay

BATCH = 100 * 4
"""Bytes of an item."""


def numbered(end: int | None = None) -> Iterator[Tensor]:
    numbers = itertools.count() if end is None else range(end)
    return (torch.full((100,), float(i)) for i in numbers)


def first(replay: Replay[Tensor], count: int) -> list[int]:
    return [int(x[0]) for x in itertools.islice(replay, count)]


def test_what_was_drawn_is_given_again() -> None:
    replay = Replay(numbered(4), most_bytes=4 * BATCH)
    assert first(replay, 2) == [0, 1]
    assert first(replay, 9) == first(replay, 9) == [0, 1, 2, 3]
    assert not replay.overflows


def test_an_endless_iterator_fills_no_memory_and_goes_on() -> None:
    replay = Replay(numbered(), most_bytes=3 * BATCH)
    assert first(replay, 6) == [0, 1, 2, 3, 4, 5]
    assert replay.overflows
    assert first(replay, 5) == [0, 1, 2, 6, 7]
    assert len(replay._seen) == 3


def test_an_iterator_that_was_not_kept_and_has_ended_is_refused_in_a_sentence() -> None:
    replay = Replay(numbered(5), most_bytes=3 * BATCH)
    with pytest.raises(SourceError, match="give a DataLoader or a Dataset"):
        list(replay)
