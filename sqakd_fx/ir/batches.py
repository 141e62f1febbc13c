"""Batches: tuples of a graph's inputs, tensors with the samples on the first axis and what is no tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def moved(batch: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """The batch with its tensors on `device`."""
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in batch)


def rows(batch: tuple[Any, ...], start: int, end: int) -> tuple[Any, ...]:
    """Some samples of a batch; what has not as many rows as its first tensor stays whole."""
    size = len(batch[0])
    return tuple(
        x[start:end] if isinstance(x, Tensor) and x.ndim and len(x) == size else x for x in batch
    )
