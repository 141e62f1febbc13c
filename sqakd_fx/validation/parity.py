"""Differences of two computations of one quantized tensor, counted in codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TensorParity:
    """Differences of one quantized tensor, in codes: histogram of |difference| to count."""

    name: str
    producer: str
    elements: int
    histogram: dict[int, int]

    @property
    def largest(self) -> int:
        return max((step for step, count in self.histogram.items() if count), default=0)

    def share_above(self, steps: int) -> float:
        """Share of elements more than `steps` codes off."""
        return sum(c for s, c in self.histogram.items() if s > steps) / max(self.elements, 1)


def first_divergence(tensors: Iterable[TensorParity]) -> TensorParity | None:
    """The first tensor with a code that differs."""
    return next((tensor for tensor in tensors if tensor.largest > 0), None)


def count_steps(
    counter: Counter[int], got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]
) -> None:
    """Add how many elements are how many codes apart."""
    if np.array_equal(got, wanted):
        counter[0] += wanted.size
        return
    steps = np.abs(got.astype(np.int32) - wanted.astype(np.int32))
    values, counts = np.unique(steps, return_counts=True)
    counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
