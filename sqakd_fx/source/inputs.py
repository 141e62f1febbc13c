"""The user's training data as tuples in the order of the graph's inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqakd_fx.engine.determinism import seed_everything, undisturbed_randomness
from sqakd_fx.errors import SourceError
from sqakd_fx.program import Program
from sqakd_fx.recipe import Recipe
from sqakd_fx.source.batches import Batch, Batches, input_batches, labelled_batches, replayable
from sqakd_fx.source.source import Source
from sqakd_fx.training.held_out import split_data


@dataclass(frozen=True)
class TrainingInputs:
    """Batches by epoch; `undivided` says why nothing of them is kept back to measure agreement on."""

    batches: Batches[Batch]
    labelled: Batches[tuple[Batch, Any]] | None
    kept_back: Batches[Batch] | None
    undivided: str | None
    seed: int
    program: Program

    def epoch(self, number: int) -> Iterator[tuple[Any, ...]]:
        self.batches.set_epoch(number)
        for batch in self.batches:
            yield self._flat(batch)

    def training(self, number: int) -> Iterator[tuple[Any, ...]]:
        """The batches of `epoch`, with the labels behind the inputs where the recipe trains on them."""
        if self.labelled is None:
            yield from self.epoch(number)
            return
        self.labelled.set_epoch(number)
        for batch, target in self.labelled:
            yield (*self._flat(batch), torch.as_tensor(target))

    def held_out(self) -> list[tuple[Any, ...]]:
        """Batches that no epoch has, the same in every run; none where `undivided` says why."""
        with undisturbed_randomness():
            seed_everything(self.seed)
            return [self._flat(batch) for batch in self.kept_back or ()]

    def count(self) -> int:
        known = self.batches.length()
        return known if known else sum(1 for _ in self.batches)

    def _flat(self, batch: Batch) -> tuple[Any, ...]:
        return self.program.traced.call.flatten(batch.args, batch.kwargs)


def training_inputs(source: Source, program: Program, recipe: Recipe) -> TrainingInputs:
    """Batches of unlabelled inputs; raises SourceError where there is no data."""
    if source.train_data is None:
        raise SourceError(f"{source.spec} gives no training data: add train_data() or use --data")
    split = split_data(replayable(source.train_data), recipe.held_out)
    form: dict[str, Any] = {
        "n_inputs": source.n_inputs,
        "input_names": source.input_names,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "example_ndim": source.example_ndim,
        "workers": recipe.workers,
    }
    return TrainingInputs(
        input_batches(split.training, shuffle=True, **form),
        labelled_batches(split.training, shuffle=True, drop_last=True, what="training data", **form)
        if recipe.labels
        else None,
        None if split.held_out is None else input_batches(split.held_out, shuffle=False, **form),
        split.reason,
        recipe.seed,
        program,
    )


def calibration_batches(
    inputs: TrainingInputs, recipe: Recipe, device: torch.device
) -> Iterator[tuple[Any, ...]]:
    """The first batches of the first epoch, on `device`; raises SourceError where one is not finite."""
    for index, batch in enumerate(itertools.islice(inputs.epoch(0), recipe.calibration_batches)):
        bad = any(
            isinstance(x, Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all())
            for x in batch
        )
        if bad:
            raise SourceError(f"batch {index} of the data holds NaN or infinity: clean the data")
        yield tuple(x.to(device) if isinstance(x, Tensor) else x for x in batch)
