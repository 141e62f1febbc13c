"""Unlabelled samples that training never sees, and how often the student agrees with the teacher on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from sqakd_fx.diagnostics.batch_errors import batch_named, length_of
from sqakd_fx.frontend.output_kinds import named_outputs
from sqakd_fx.ir.batches import moved
from sqakd_fx.ir.modes import evaluation_mode
from sqakd_fx.ir.outputs import separated
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.losses import judged_axis, output_loss, parts_of, relative_error

_SHARE_OF_TIME = 0.02
_SHARE_OF_DATA = 20


@dataclass(frozen=True)
class Split:
    """Training data, and held-out data that is None where the data was not divided; `reason` says why."""

    training: Any
    held_out: Any | None
    reason: str | None = None


def split_data(data: Any, samples: int) -> Split:
    """Hold out the last `samples` of `data`, but at most a twentieth of it.

    Tensors, arrays, lists, datasets with a length, and loaders that take all samples of one, in order or
    shuffled, are divided; of loaders whole batches where a twentieth holds any. Other loaders and streams
    decide themselves what they give and are left whole. No data is read.
    """
    if not samples:
        return Split(data, None)
    if isinstance(data, DataLoader):
        return _split_loader(data, samples)
    if not _gives_by_number(data):
        return Split(data, None, "the data has no length or gives no samples by number")
    total = length_of(data, "training data")
    kept = total - min(samples, total // _SHARE_OF_DATA)
    if kept == total:
        return Split(data, None, _too_few(total))
    if isinstance(data, Tensor | np.ndarray | list | tuple):
        return Split(data[:kept], data[kept:])
    return Split(Subset(data, range(kept)), Subset(data, range(kept, total)))


def _gives_by_number(data: Any) -> bool:
    if isinstance(data, IterableDataset | Mapping | str | type):
        return False
    if isinstance(data, Tensor | np.ndarray) and not data.ndim:
        return False
    return hasattr(data, "__getitem__") and isinstance(data, Sized)


def _too_few(total: int) -> str:
    return f"the data has {total} items, and {_SHARE_OF_DATA} is the least that is divided"


def _split_loader(loader: DataLoader[Any], samples: int) -> Split:
    """Two loaders over the same dataset, whose samplers take its first and its last samples.

    The last ones come in order, with a generator of their own: drawing them leaves the user's alone.
    """
    if reason := _undivided(loader):
        return Split(loader, None, reason)
    total = length_of(loader.dataset, "training data")  # type: ignore[arg-type]
    batch = loader.batch_size or 1
    held = min(samples, total // _SHARE_OF_DATA)
    held = held // batch * batch or held
    if not held:
        return Split(loader, None, _too_few(total))
    if not loader.drop_last and (total - held) % batch == 1:
        held += 1  # BatchNorm cannot train on a last batch of one sample
    kept = total - held
    if loader.drop_last and kept < batch:
        return Split(
            loader, None, "the loader drops incomplete batches, and no other would be left"
        )
    sampler: Sampler[int] = SequentialSampler(range(kept))
    if isinstance(loader.sampler, RandomSampler):
        sampler = RandomSampler(range(kept), generator=loader.sampler.generator)
    return Split(
        _with_sampler(
            loader,
            sampler,
            drop_last=loader.drop_last,
            generator=loader.generator,
            persistent_workers=loader.persistent_workers,
        ),
        _with_sampler(
            loader,
            range(kept, total),
            drop_last=loader.drop_last and held >= batch,
            generator=torch.Generator().manual_seed(0),
            persistent_workers=False,
        ),
    )


def _undivided(loader: DataLoader[Any]) -> str | None:
    """Why a loader does not simply give every sample of its dataset once; None where it does."""
    if type(loader) is not DataLoader:
        return f"the loader is a {type(loader).__name__}, not a plain DataLoader"
    if not _gives_by_number(loader.dataset):
        return "the loader's dataset has no length or gives no samples by number"
    if loader.batch_size is None and loader.batch_sampler is not None:
        return f"the loader has its own batch sampler, a {type(loader.batch_sampler).__name__}"
    sampler = loader.sampler
    plain = type(sampler) in (SequentialSampler, RandomSampler) and (
        sampler.data_source is loader.dataset  # type: ignore[attr-defined]
    )
    if isinstance(sampler, RandomSampler):
        plain = plain and not sampler.replacement and sampler._num_samples is None
    if not plain:
        return f"the loader has its own sampler, a {type(sampler).__name__}"
    return None


def _with_sampler(
    loader: DataLoader[Any], sampler: Iterable[int], *, drop_last: bool, **others: Any
) -> DataLoader[Any]:
    if loader.batch_size is not None:
        others["drop_last"] = drop_last
    if loader.pin_memory_device:
        others["pin_memory_device"] = loader.pin_memory_device
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        in_order=loader.in_order,
        **others,
    )


class HeldOut:
    """Measures agreement on batches of held-out inputs.

    The teacher's answers are taken once. Measuring changes nothing that training depends on.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Tensor, ...]],
        teacher: Callable[..., Any],
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self.recipe = recipe
        self.batches = [moved(batch, device) for batch in batches]
        self.since = time.monotonic()
        self.targets = []
        for index, batch in enumerate(self.batches):
            with batch_named(f"batch {index} of the held-out data", batch), torch.no_grad():
                self.targets.append(teacher(*batch))
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
        with evaluation_mode(student):
            shares = [
                agreement(student.forward(*batch), target, self.recipe)
                for batch, target in zip(self.batches, self.targets, strict=True)
            ]
        mean = float(torch.stack(shares).mean())
        self.cost = time.monotonic() - started
        self.spent += self.cost
        return mean


def agreement(student: Any, teacher: Any, recipe: Recipe) -> Tensor:
    """Mean over the outputs that have a loss: the share of equal predictions, 1 - error where there are no classes.

    The error of an output that joins unlike parts is the mean of theirs.
    """
    shares = []
    for (name, t), (_, s) in zip(named_outputs(teacher), named_outputs(student), strict=True):
        shape = tuple(t.shape)
        if output_loss(recipe, shape, name) is None:
            continue
        axis = judged_axis(recipe, shape, name)
        if axis is None:
            sizes = parts_of(recipe, name)
            pairs = zip(separated(s, sizes), separated(t, sizes), strict=True)
            shares.append(1 - torch.stack([relative_error(a, b) for a, b in pairs]).mean())
        else:
            shares.append((s.argmax(axis) == t.argmax(axis)).float().mean())
    return torch.stack(shares).mean()
