"""The batches that the steps of a run take, and the first of them, which stand for all before it starts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqakd_fx.engine.determinism import seed_everything, undisturbed_randomness
from sqakd_fx.errors import TrainingError
from sqakd_fx.ir.batches import first_batches, moved, samples_in
from sqakd_fx.recipe.keys import Recipe

EpochBatches = Callable[[int], Iterable[tuple[Tensor, ...]]]
"""Epoch number to an iterable of input tuples; the same number gives the same batches.

Where the recipe's loss has a share of `labels`, every tuple ends with them."""


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from, by epoch, and batches that no epoch has, to measure agreement on."""

    epochs: EpochBatches
    steps_per_epoch: int
    held_out: Sequence[tuple[Tensor, ...]] = ()


@dataclass(frozen=True)
class StepBatches:
    """Batches by step: `steps_per_epoch` of each epoch."""

    data: TrainingData
    recipe: Recipe
    device: torch.device

    @property
    def steps_per_epoch(self) -> int:
        """At least 1."""
        return max(self.data.steps_per_epoch, 1)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        recipe = self.recipe
        return recipe.epochs * self.data.steps_per_epoch if recipe.steps is None else recipe.steps

    def between(self, step: int, end: int) -> Iterator[tuple[Tensor, ...]]:
        """The batches of steps `step` to `end - 1`; an epoch's order and augmentation follow its seed.

        Raises:
            TrainingError: an epoch gives none.
        """
        while step < end:
            epoch, skip = divmod(step, self.steps_per_epoch)
            seed_everything(self.recipe.seed * 1_000_003 + epoch)
            for batch in itertools.islice(self._repeated(epoch), skip, self.steps_per_epoch):
                yield batch
                step += 1
                if step == end:
                    return

    def _repeated(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """An epoch's batches, again where they are fewer than they were counted."""
        while True:
            drawn = False
            for batch in self.data.epochs(epoch):
                drawn = True
                yield batch
            if not drawn:
                raise TrainingError("the training data gave no batch: check train_data() or --data")

    def calibration(self) -> Generator[tuple[Tensor, ...], None, None]:
        """First inputs of the first epoch, on the device; what loaders and augmentations draw next is not changed."""
        with undisturbed_randomness():
            seed_everything(self.recipe.seed)
            for batch in first_batches(self.data.epochs(0), self.recipe.calibration_batches):
                inputs = self.without_labels(batch)
                yield moved(inputs, self.device)

    def first(self) -> tuple[Tensor, ...]:
        """The first inputs that calibration sees; none where there is no batch."""
        with contextlib.closing(self.calibration()) as batches:
            return next(batches, ())

    def samples(self) -> int:
        """Samples in a batch, as the first one has them; 0 where no input has a batch axis."""
        return samples_in(self.first(), 0)

    def without_labels(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs alone."""
        return batch[:-1] if self.recipe.labels else batch
