"""Batches: the tensors that a graph takes in one call, most of them with the samples on the first axis."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_LEAST_SAMPLES = 4
"""Of a batch, where batches are counted: smaller ones count as a part of it."""


def moved(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The batch on `device`."""
    return tuple(x.to(device) for x in batch)


def first_batches(
    batches: Iterable[tuple[Tensor, ...]], count: int
) -> Iterator[tuple[Tensor, ...]]:
    """The first `count` batches; more where these have few samples: four of each batch in all."""
    left = float(count)
    for batch in batches:
        left -= _share(batch)
        yield batch
        if left <= 0:
            return


def last_batches(batches: Iterable[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
    """The last `count` batches; more where these have few samples: four of each batch in all."""
    kept: deque[tuple[Tensor, ...]] = deque()
    held = 0.0
    for batch in batches:
        kept.append(batch)
        held += _share(batch)
        while held - _share(kept[0]) >= count:
            held -= _share(kept.popleft())
    return list(kept)


def _share(batch: tuple[Tensor, ...]) -> float:
    return min(samples_in(batch, _LEAST_SAMPLES) / _LEAST_SAMPLES, 1.0)


def samples_in(batch: Iterable[Any], otherwise: int) -> int:
    """The length of the first tensor that has axes; `otherwise` where there is none."""
    return next((len(x) for x in batch if isinstance(x, Tensor) and x.ndim), otherwise)


def rows(batch: tuple[Tensor, ...], start: int, end: int) -> tuple[Tensor, ...]:
    """Some samples of a batch; a tensor with another number of rows than the first stays whole."""
    size = len(batch[0])
    return tuple(x[start:end] if x.ndim and len(x) == size else x for x in batch)
