"""What training does to a student beside the gradient step: the callback of low bit widths.

A callback acts before and after every step and once at the end, and keeps its state in tensors, so that a
resumed run is the uninterrupted one. Which ones a run uses is up to its recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.features import FeatureLoss, TrainingPair, fading_features
from sqakd_fx.training.gradient_schedules import refreshed_delta, scheduled_mu
from sqakd_fx.training.oscillation import OscillationFreezing
from sqakd_fx.training.progressive_bits import ProgressiveBits


class Callback(Protocol):
    """One thing done to the student during training; steps count from 0 to `total` - 1."""

    @property
    def name(self) -> str:
        """What a checkpoint calls it."""

    def before_step(self, step: int, total: int) -> bool:
        """Before the forward of a step; True where losses so far say nothing of what comes."""

    def after_step(self, step: int, total: int) -> None:
        """After the optimizer's step."""

    def finish(self) -> None:
        """After the last step."""

    def tensors(self) -> dict[str, Tensor]:
        """All state that a resumed run needs, by name; it is copied."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state that `tensors` gave, on the CPU or the student's device."""


@dataclass(frozen=True)
class EveryStep:
    """A callback without state: `act` sets something by (step, total) before a step."""

    name: str
    act: Callable[[int, int], None]

    def before_step(self, step: int, total: int) -> bool:
        self.act(step, total)
        return False

    def after_step(self, step: int, total: int) -> None: ...

    def finish(self) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


class WeightAverage:
    """Exponential moving average of the student's parameters, which become the average at the end."""

    name = "weight_average"

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(student.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    def before_step(self, step: int, total: int) -> bool:
        return False

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


def low_bit_callbacks(
    student: fx.GraphModule,
    recipe: Recipe,
    batches: Callable[[], Iterable[tuple[Tensor, ...]]],
    pair: TrainingPair,
    steps_per_epoch: int,
) -> list[Callback]:
    """The callbacks that a recipe asks for, in the order in which they act.

    `batches` gives the first batches of inputs, to find ranges on, on the student's device; `pair` is
    the student as it is trained.
    """
    callbacks: list[Callback] = []
    if recipe.mu and recipe.mu_schedule != "constant":
        callbacks.append(EveryStep("mu_schedule", scheduled_mu(student, recipe)))
    if recipe.feature_fade and isinstance(pair.loss, FeatureLoss):
        callbacks.append(EveryStep("feature_fade", fading_features(pair.loss, recipe)))
    if recipe.progressive:
        callbacks.append(ProgressiveBits(student, recipe, batches))
    if recipe.delta_refresh:
        every = recipe.delta_refresh * steps_per_epoch
        refresh = refreshed_delta(student, pair, recipe, batches, every)
        callbacks.append(EveryStep("delta_refresh", refresh))
    if recipe.freeze_oscillations:
        callbacks.append(OscillationFreezing(student, recipe))
    if recipe.weight_average:
        callbacks.append(WeightAverage(student, recipe.weight_average))
    return callbacks
