"""Batches: the tensors that a graph takes in one call, most of them with the samples on the first axis."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The batch on `device`."""
    return tuple(x.to(device) for x in batch)


def rows(batch: tuple[Tensor, ...], start: int, end: int) -> tuple[Tensor, ...]:
    """Some samples of a batch; a tensor with another number of rows than the first stays whole."""
    size = len(batch[0])
    return tuple(x[start:end] if x.ndim and len(x) == size else x for x in batch)
