"""Data that can be read once only, given again: an iterator, or a generator that may never end."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sqakd_fx.errors import SourceError

T = TypeVar("T")
_SHARE_OF_MEMORY = 0.5
"""Of the machine's, that the items of an iterator may take."""


def memory() -> float:
    """Bytes of the machine's memory; no limit where it does not tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


class Replay(Generic[T]):
    """A one-shot iterator made re-iterable: what was drawn is kept in memory and given again.

    Nothing is drawn before it is asked for. The first items are kept, up to `most_bytes`; those behind them are given
    once, each to whoever asks first, and `overflows` is true from then on.
    """

    def __init__(self, source: Iterator[T], most_bytes: float | None = None) -> None:
        self._source = source
        self._seen: list[T] = []
        self._room = _SHARE_OF_MEMORY * memory() if most_bytes is None else most_bytes
        self.overflows = False

    def __iter__(self) -> Iterator[T]:
        """Raises SourceError where the source has ended and not all of it was kept."""
        index = 0
        while True:
            if index < len(self._seen):
                yield self._seen[index]
                index += 1
                continue
            try:
                item = next(self._source)
            except StopIteration:
                self._require_all_kept()
                return
            self._room -= _bytes(item)
            if self._room >= 0 and not self.overflows:
                self._seen.append(item)
                index += 1
            else:
                self.overflows = True
            yield item

    def _require_all_kept(self) -> None:
        if self.overflows:
            raise SourceError(
                "the data is an iterator that has ended, and is too large to be kept in memory and given again: give a "
                "DataLoader or a Dataset, which can be read anew"
            )


def replayable(data: Any) -> Any:
    """`data` itself, or for a one-shot iterator a `Replay` of it."""
    return Replay(data) if isinstance(data, Iterator) and iter(data) is data else data


def _bytes(item: Any) -> int:
    leaves = tree_leaves(item)
    return sum(x.nbytes for x in leaves if isinstance(x, Tensor | np.ndarray))
