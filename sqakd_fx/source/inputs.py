"""The user's training data as tuples in the order of the graph's inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sqakd_fx.diagnostics.batch_errors import require_finite
from sqakd_fx.engine.determinism import seed_everything, undisturbed_randomness
from sqakd_fx.errors import SourceError, short
from sqakd_fx.ir.batches import first_batches, moved
from sqakd_fx.ir.outputs import class_axis
from sqakd_fx.program import Program
from sqakd_fx.source.batches import (
    Batch,
    Batches,
    Loading,
    input_batches,
    labelled_batches,
)
from sqakd_fx.source.items import form_of
from sqakd_fx.source.replay import replayable
from sqakd_fx.source.sizes import Sizes, batch_size_of, sizes_of
from sqakd_fx.source.source import Source
from sqakd_fx.source.synthetic import DataFree, synthetic_samples
from sqakd_fx.training.held_out import Split, split_data

_MOST_COUNTED = 100_000
"""Batches of a stream that are counted before it is taken to have no end."""
_LEFT_OUT = -100
"""The label that torch's cross-entropy leaves out."""


@dataclass(frozen=True)
class TrainingInputs:
    """Batches by epoch; `undivided` says why nothing of them is kept back to measure agreement on.

    `sizes` sees what calibration takes.
    """

    batches: Batches[Batch]
    labelled: Batches[tuple[Batch, Any]] | None
    kept_back: Batches[Batch] | None
    undivided: str | None
    program: Program
    sizes: Sizes

    def epoch(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        self.batches.set_epoch(number)
        for batch in self.batches:
            yield self._flat(batch)

    def training(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        """The batches of `epoch`, with the labels behind the inputs where the recipe trains on them."""
        if self.labelled is None:
            yield from self.epoch(number)
            return
        self.labelled.set_epoch(number)
        for index, (batch, target) in enumerate(self.labelled):
            yield (*self._flat(batch), self._classes(target, f"batch {index} of the training data"))

    def held_out(self) -> list[tuple[Tensor, ...]]:
        """Batches that no epoch has, the same in every run; none where `undivided` says why."""
        with undisturbed_randomness():
            seed_everything(self.program.recipe.seed)
            batches = [self._flat(batch) for batch in self.kept_back or ()]
        for index, batch in enumerate(batches):
            require_finite(batch, f"batch {index} of the held-out data")
        return batches

    def count(self) -> int:
        """Batches in an epoch; of a stream that does not say, no more than the steps that the recipe asks for.

        Raises:
            SourceError: neither the data nor the recipe says where training ends.
        """
        if known := self.batches.length():
            return known
        steps = self.program.recipe.steps
        counted = 0
        for _ in itertools.islice(self.batches, _MOST_COUNTED if steps is None else steps):
            counted += 1
            if self.batches.overflows:
                break
        if steps is None and (counted == _MOST_COUNTED or self.batches.overflows):
            raise SourceError(
                f"the training data gave {counted} batches and did not end: say with --steps (the recipe's steps) how "
                "many to train for, or give data with a length"
            )
        return steps if steps is not None and self.batches.overflows else counted

    def _classes(self, target: Any, batch: str) -> Tensor:
        """Labels as a tensor.

        Raises:
            SourceError: they are no numbers, or one is no class of the first output.
        """
        try:
            labels = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SourceError(
                f"the labels of {batch} are not numbers ({short(error)}): give class numbers, or leave labels = 0"
            ) from error
        shape = self.program.outputs[0].shape
        axis = class_axis(shape)
        if axis is not None:
            require_classes(labels, shape[axis], batch)
        return labels

    def _flat(self, batch: Batch) -> tuple[Tensor, ...]:
        return self.program.traced.call.flatten(batch.args, batch.kwargs)


def require_classes(labels: Tensor, count: int, batch: str) -> None:
    """Raise SourceError where a whole number among `labels` is none of 0 to `count - 1`, nor what a loss leaves out."""
    if labels.is_floating_point() or labels.is_complex():
        return
    stranger = first_no_class(labels[labels != _LEFT_OUT], count)
    if stranger is not None:
        raise SourceError(
            f"{batch} has the label {stranger:g}, and the model has the classes 0 to {count - 1}: give these, or "
            f"{_LEFT_OUT} for what has none"
        )


def first_no_class(labels: Tensor, count: int) -> float | None:
    """The first label that is none of the whole numbers 0 to `count - 1`."""
    numbers = labels.double()
    strange = numbers[~((numbers >= 0) & (numbers < count) & (numbers == numbers.round()))]
    return strange[0].item() if strange.numel() else None


def training_inputs(data: Any, program: Program, sizes: Sizes | None = None) -> TrainingInputs:
    """Batches of a program's inputs from training data (see `input_batches`), as its recipe wants them."""
    recipe, form = program.recipe, form_of(program.traced.call)
    data, size = replayable(data), batch_size_of(program)
    split = split_data(data, recipe.held_out)
    if program.traced.fixed_batch and size > 1 and split.held_out is not None:
        split = Split(data, None, f"the model takes batches of {size} only")
    loading = Loading(size, shuffle=True, seed=recipe.seed, workers=recipe.workers)
    return TrainingInputs(
        input_batches(split.training, form, loading),
        labelled_batches(split.training, form, loading) if recipe.labels else None,
        None
        if split.held_out is None
        else input_batches(split.held_out, form, replace(loading, shuffle=False)),
        split.reason,
        program,
        sizes or Sizes(program, None),
    )


def with_samples(
    source: Source,
    program: Program,
    wanted: DataFree,
    device: torch.device,
    on_step: Callable[[int, int], None],
) -> Source:
    """The source with inputs that are made of its model's statistics, and a note of them.

    Raises:
        SourceError: the model's statistics do not tell of its inputs.
    """
    made = synthetic_samples(
        source.model,
        source.example_kwargs or source.example_inputs,
        wanted,
        batch_size=batch_size_of(program),
        seed=program.recipe.seed,
        device=device,
        on_step=on_step,
    )
    note = f"there is no data: {made.sentence}"
    if source.eval_data is None:
        note += "; what is said of the file beside float is of such inputs, and real ones may fare worse"
    return replace(source, train_data=made, notes=(note,))


def source_inputs(source: Source, program: Program) -> TrainingInputs:
    """The training inputs of a source; raises SourceError where it has no data."""
    if source.train_data is None:
        raise SourceError(
            f"{source.spec} gives no training data: add train_data(), or use --data or --data-free"
        )
    return training_inputs(source.train_data, program, sizes_of(source, program))


def calibration_batches(
    inputs: TrainingInputs, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """The first batches of the first epoch, on `device`: the recipe's number of them, more where they are small.

    Raises:
        SourceError: one is not finite, or of a size at which the graph is not the model.
    """
    count = inputs.program.recipe.calibration_batches
    for index, batch in enumerate(first_batches(inputs.epoch(0), count)):
        require_finite(batch, f"batch {index} of the data")
        inputs.sizes.see(batch)
        yield moved(batch, device)
