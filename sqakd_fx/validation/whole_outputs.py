"""Outputs of two computations of one model: how far the numbers are apart, and whether predictions change.

From the same codes, outputs differ by float rounding alone (`relative_errors`). End to end, a code that lies on a tie
may differ by one step and change codes behind it. There, a prediction counts as another one only where the margin
between the two classes is beyond the measured rounding (`Predictions`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sqakd_fx.ir.outputs import class_axis

FLOAT_TOLERANCE = 1e-3
"""Relative error of an output that float32 rounding explains, from the same codes."""
_MARGIN = 4.0
"""Times the rounding of the scores: a smaller margin between two classes is a tie."""
_CHANGES = 1e-3
"""Share of the predictions that may change beyond a tie."""
_DEVIATIONS = 3.0


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Root of the mean squared difference over the root of the mean square of `wanted`; of whole numbers the share
    that is another. What is not finite must be the same."""
    if got.shape != wanted.shape:
        return math.inf
    if not wanted.is_floating_point():
        return float((got != wanted).double().mean()) if got.numel() else 0.0
    finite = wanted.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(
        got[~finite].nan_to_num(), wanted[~finite].nan_to_num()
    ):
        return math.inf
    ours, theirs = got[finite].double(), wanted[finite].double()
    noise, signal = float((ours - theirs).square().sum()), float(theirs.square().sum())
    return math.sqrt(noise / signal) if signal else math.sqrt(noise)


def relative_errors(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """The relative error of each output."""
    return [relative_error(a, b) for a, b in zip(got, wanted, strict=True)]


class Predictions:
    """Predictions of two computations over all batches, in the outputs that have classes.

    `axes` has the axis of the classes by output; None where the shape of the first output tells it.
    """

    def __init__(self, axes: Mapping[int, int] | None) -> None:
        self.axes = axes
        self.decisions = self.same = self.changed = 0

    @property
    def share(self) -> float:
        """Equal predictions; 1 where there are none."""
        return self.same / self.decisions if self.decisions else 1.0

    @property
    def are_the_same(self) -> bool:
        """Whether no more predictions changed beyond a tie than so few decisions may by chance."""
        expected = _CHANGES * self.decisions
        return self.changed <= expected + _DEVIATIONS * math.sqrt(expected)

    def add(self, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        """Count over one batch of outputs."""
        for index, axis in self._axes(wanted).items():
            ours, theirs = got[index].double(), wanted[index].double()
            first, second = ours.argmax(axis, keepdim=True), theirs.argmax(axis, keepdim=True)
            other = first != second
            margin = theirs.gather(axis, second) - theirs.gather(axis, first)
            tie = _MARGIN * _rounding(ours - theirs, other)
            self.decisions += other.numel()
            self.same += int((~other).sum())
            self.changed += int((other & (margin > tie)).sum())

    def _axes(self, outputs: Sequence[Tensor]) -> Mapping[int, int]:
        if self.axes is not None:
            return self.axes
        axis = class_axis(tuple(outputs[0].shape))
        return {} if axis is None else {0: axis}


def _rounding(difference: Tensor, other: Tensor) -> float:
    """Root mean squared difference of scores where predictions are the same; 0 where all are others."""
    same = (~other).expand_as(difference)
    return float(difference[same].square().mean().sqrt()) if bool(same.any()) else 0.0
