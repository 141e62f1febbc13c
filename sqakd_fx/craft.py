"""What training does to a student beside the gradient step: the craft of low bit widths.

A craft acts before and after every step and once at the end, may add a term to the loss, and keeps its
state in tensors, so that a resumed run is the uninterrupted one. Which ones a run uses is up to its recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from sqakd_fx.features import FadingFeatures, FeatureLoss, TrainingPair
from sqakd_fx.modulation import RefreshedDelta, ScheduledMu
from sqakd_fx.oscillation import OscillationFreezing
from sqakd_fx.progressive import ProgressiveBits
from sqakd_fx.recipe import Recipe


class Craft(Protocol):
    """One thing done to the student during training; steps count from 0 to `total` - 1."""

    def before_step(self, step: int, total: int) -> bool:
        """Before the forward of a step; True where losses so far say nothing of what comes."""

    def penalty(self) -> Tensor | None:
        """A scalar added to the loss, asked for after the student's forward; None for none.

        A batch that is computed in parts asks once a part and weighs the answers by their samples.
        """

    def after_step(self, step: int, total: int) -> None:
        """After the optimiser's step."""

    def finish(self) -> None:
        """After the last step."""

    def tensors(self) -> dict[str, Tensor]:
        """All state that a resumed run needs, by name; it is copied."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state that `tensors` gave, on the CPU or the student's device."""


class WeightAverage:
    """Exponential moving average of the student's parameters, which become the average at the end."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(student.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    def before_step(self, step: int, total: int) -> bool:
        return False

    def penalty(self) -> Tensor | None:
        return None

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        torch._foreach_lerp_(
            list(self.values.values()), list(self.parameters.values()), 1 - self.decay
        )

    @torch.no_grad()
    def finish(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])

    def tensors(self) -> dict[str, Tensor]:
        return self.values

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(tensors[name])


def low_bit_craft(
    student: fx.GraphModule,
    recipe: Recipe,
    batches: Callable[[], Iterable[tuple[Any, ...]]],
    pair: TrainingPair,
    steps_per_epoch: int,
) -> list[Craft]:
    """The crafts that a recipe asks for, in the order in which they act.

    `batches` gives the first batches of inputs, to find ranges on, on the student's device; `pair` is
    the student as it is trained.
    """
    crafts: list[Craft] = []
    if recipe.mu and recipe.mu_schedule != "constant":
        crafts.append(ScheduledMu(student, recipe))
    if recipe.feature_fade and isinstance(pair.loss, FeatureLoss):
        crafts.append(FadingFeatures(pair.loss, recipe))
    if recipe.progressive:
        crafts.append(ProgressiveBits(student, recipe, batches))
    if recipe.delta_refresh:
        every = recipe.delta_refresh * steps_per_epoch
        crafts.append(RefreshedDelta(student, pair, recipe, batches, every))
    if recipe.freeze_oscillations:
        crafts.append(OscillationFreezing(student, recipe))
    if recipe.weight_average:
        crafts.append(WeightAverage(student, recipe.weight_average))
    return crafts
