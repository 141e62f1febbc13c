"""Unlabelled samples that training never sees, and how often the student agrees with the teacher on them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from sqakd_fx.losses import agreement

_SHARE_OF_TIME = 0.02


@dataclass(frozen=True)
class Split:
    """Training data, and held-out data that is None where the data gives no samples by number."""

    training: Any
    held_out: Any | None


def split_data(data: Any, samples: int) -> Split:
    """Hold out the last `samples` of `data`, but at most a twentieth of it.

    Tensors, arrays, lists and datasets with a length are divided. A loader or a stream decides itself
    what it gives and is left whole.
    """
    by_number = hasattr(data, "__getitem__") and isinstance(data, Sized)
    if not by_number or isinstance(data, DataLoader | IterableDataset | Mapping | str):
        return Split(data, None)
    if isinstance(data, Tensor | np.ndarray) and not data.ndim:
        return Split(data, None)
    total = len(data)
    kept = total - min(samples, total // 20)
    if kept == total:
        return Split(data, None)
    if isinstance(data, Tensor | np.ndarray | list | tuple):
        return Split(data[:kept], data[kept:])
    return Split(Subset(data, range(kept)), Subset(data, range(kept, total)))


class HeldOut:
    """Measures agreement on batches of held-out inputs.

    The teacher's answers are taken once. Measuring changes nothing that training depends on.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Any, ...]],
        teacher: nn.Module,
        device: torch.device,
    ) -> None:
        self.batches = [_placed(batch, device) for batch in batches]
        self.since = time.monotonic()
        with torch.no_grad():
            self.targets = [teacher.forward(*batch) for batch in self.batches]
        self.cost = time.monotonic() - self.since
        self.spent = 0.0

    @property
    def is_affordable(self) -> bool:
        """Whether measuring again keeps its share of the time since the start below a fiftieth."""
        return self.spent + self.cost <= _SHARE_OF_TIME * (time.monotonic() - self.since)

    @torch.no_grad()
    def agreement(self, student: fx.GraphModule) -> float:
        """Mean share of equal predictions, in evaluation mode; 1 - error where there are no classes."""
        started = time.monotonic()
        was_training = student.training
        student.eval()
        shares = [
            agreement(student.forward(*batch), target)
            for batch, target in zip(self.batches, self.targets, strict=True)
        ]
        student.train(was_training)
        mean = float(torch.stack(shares).mean())
        self.cost = time.monotonic() - started
        self.spent += self.cost
        return mean


def _placed(batch: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in batch)
