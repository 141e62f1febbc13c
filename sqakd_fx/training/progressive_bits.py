"""Fewer bits step by step: training starts on wide grids and narrows them on schedule (8, 4, then 2).

The first `progressive_share` of the steps is divided evenly among the widths of the recipe's `progressive`;
the rest runs at each quantizer's own bits. A quantizer is never narrower than its own bits. Where a width
changes, ranges are found again on the first batches of the first epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx

from sqakd_fx.quant.calibration import recalibrate
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.keys import Recipe


def stage_of(recipe: Recipe, step: int, total: int) -> int:
    """Index into `recipe.progressive` of a step, its length from where every grid is final."""
    each = recipe.progressive_share * total / len(recipe.progressive)
    return min(int(step / each), len(recipe.progressive))


class ProgressiveBits:
    """Sets the bits of all quantizers of `student` by the step; a `Callback`.

    `batches` gives tuples of model inputs on the student's device, the same ones every time.
    """

    name = "progressive"

    def __init__(
        self,
        student: fx.GraphModule,
        recipe: Recipe,
        batches: Callable[[], Iterable[tuple[Tensor, ...]]],
    ) -> None:
        self.student, self.recipe, self.batches = student, recipe, batches
        self.own = {name: q.bits for name, q in quantizers_of(student).items()}
        self.stage: int | None = None

    def before_step(self, step: int, total: int) -> bool:
        stage = stage_of(self.recipe, step, total)
        if stage == self.stage:
            return False
        self._set_bits(stage)
        recalibrate(self.student, self.batches(), method=self.recipe.initialization)
        return True

    def _set_bits(self, stage: int) -> None:
        self.stage = stage
        least = (*self.recipe.progressive, 1)[stage]
        for name, quantizer in quantizers_of(self.student).items():
            quantizer.set_bits(max(least, self.own[name]))

    def after_step(self, step: int, total: int) -> None: ...

    def finish(self) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        return {"stage": torch.tensor(-1 if self.stage is None else self.stage)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        stage = int(tensors["stage"])
        if stage >= 0:
            self._set_bits(stage)
