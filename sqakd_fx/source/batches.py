"""Batches of model inputs from whatever iterable the user has.

Items (`items.py`) are ready batches or single samples, which are collated. Samples of data with a
length are shuffled; ready batches are taken in the order in which they come.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NoReturn, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sqakd_fx.diagnostics.batch_errors import length_of
from sqakd_fx.diagnostics.source_lines import user_line
from sqakd_fx.errors import SourceError, short
from sqakd_fx.source.items import Form, Layout, Record, collate_items, collated
from sqakd_fx.source.replay import Replay, replayable

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one call of the model; every tensor has the samples on its first axis."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Loading:
    """How samples become batches.

    Attributes:
        batch_size: samples in a batch that is collated here. Ready batches keep their size.
        shuffle: permute samples of data that has a length, anew for each `set_epoch`.
        drop_last: leave out an incomplete last batch unless it is the only one.
        workers: processes that load and collate samples of a Dataset ahead of the training loop; 0: none.
    """

    batch_size: int
    shuffle: bool = False
    drop_last: bool = True
    seed: int = 0
    workers: int = 0


class Batches(Generic[T]):
    """A re-iterable over the user's data: each iteration is one epoch.

    `labels_ignored` says whether a batch drawn so far came with labels that were not used.
    """

    def __init__(
        self, data: Any, layout: Layout, take: Callable[[Record], T], loading: Loading
    ) -> None:
        if isinstance(data, Mapping):
            raise SourceError(
                f"the {layout.what} is one dict with the keys {', '.join(map(str, data))}: "
                "give an iterable of dicts, one a batch or one a sample"
            )
        self._data = replayable(data)
        self._layout = layout
        self._take = take
        self._loading = loading
        self._epoch = 0
        self._samples: bool | None = None
        self._labels_ignored = False

    @property
    def labels_ignored(self) -> bool:
        return self._labels_ignored

    @property
    def overflows(self) -> bool:
        """Whether the data is an iterator that has given more than memory keeps."""
        return isinstance(self._data, Replay) and self._data.overflows

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iterations: it depends on (seed, epoch) alone.

        A DataLoader's own generators begin each epoch at a number of that epoch, so that a run which was stopped goes
        on with the batches that it would have had.
        """
        self._epoch = epoch
        for generator in _generators_of(self._data):
            generator.manual_seed(self._entropy())

    def length(self) -> int | None:
        """Batches in an epoch, or None where the data does not say."""
        data = self._data
        if _is_array(data) or _is_map_style(data):
            total = length_of(data, self._layout.what)
            if total == 0 or not self._holds_samples():
                return total
            if self._drops(total):
                return total // self._loading.batch_size
            return math.ceil(total / self._loading.batch_size)
        if isinstance(data, DataLoader) and data.batch_sampler is not None:
            try:
                return len(data)
            except TypeError:
                return None
        return None

    def __iter__(self) -> Iterator[T]:
        records = self._records()
        index = 0
        while True:
            try:
                record = next(records, None)
                if record is not None:
                    self._layout.require_batch(record)
            except Exception as error:
                _raise_loading_error(error, self._layout.what, index)
            if record is None:
                break
            self._labels_ignored |= record.labelled
            yield self._take(record)
            index += 1
        if index == 0:
            raise SourceError(
                f"the {self._layout.what} is empty, it gave no batch: check what it reads "
                "and, in a DataLoader, batch_size and drop_last"
            )

    def _records(self) -> Iterator[Record]:
        data = self._data
        if _is_array(data):
            yield from self._from_array(data)
        elif _is_map_style(data):
            if len(data) and self._holds_samples():
                yield from self._from_samples(data)
            else:
                yield from (self._layout.split(data[i]) for i in range(len(data)))
        else:
            yield from self._from_items(data)

    def _from_array(self, data: Any) -> Iterator[Record]:
        order, _ = self._order(len(data))
        for start in range(0, len(data), self._loading.batch_size):
            chosen = order[start : start + self._loading.batch_size]
            if len(chosen) == self._loading.batch_size or not self._drops(len(data)):
                index = chosen.numpy() if isinstance(data, np.ndarray) else chosen.to(data.device)
                yield self._layout.split(data[index])

    def _from_samples(self, data: Any) -> Iterator[Record]:
        order, generator = self._order(len(data))
        yield from DataLoader(
            data,
            batch_size=self._loading.batch_size,
            sampler=order.tolist(),
            drop_last=self._drops(len(data)),
            generator=generator,
            collate_fn=partial(collate_items, self._layout),
            num_workers=self._loading.workers,
            pin_memory=self._loading.workers > 0 and torch.cuda.is_available(),
        )

    def _from_items(self, data: Iterable[Any]) -> Iterator[Record]:
        pending: list[Record] = []
        full = False
        for item in data:
            record = self._layout.split(item)
            if not self._layout.is_sample(record, unknown=False):
                full = True
                yield record
                continue
            pending.append(record)
            if len(pending) == self._loading.batch_size:
                full = True
                yield collated(pending)
                pending = []
        if pending and not (self._loading.drop_last and full):
            yield collated(pending)

    def _holds_samples(self) -> bool:
        if _is_array(self._data):
            return True
        if self._samples is None:
            unknown = not isinstance(self._data, list | tuple)
            try:
                first = self._layout.split(self._data[0])
                self._samples = self._layout.is_sample(first, unknown=unknown)
            except Exception as error:
                _raise_loading_error(error, self._layout.what, 0)
        return self._samples

    def _drops(self, total: int) -> bool:
        return self._loading.drop_last and total >= self._loading.batch_size

    def _entropy(self) -> int:
        """A number of the seed and the epoch."""
        mixed = np.random.SeedSequence([self._loading.seed % 2**64, self._epoch])
        return int(mixed.generate_state(1)[0])

    def _order(self, total: int) -> tuple[Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(self._entropy())
        if self._loading.shuffle:
            return torch.randperm(total, generator=generator), generator
        return torch.arange(total), generator


def input_batches(
    data: Any, form: Form, loading: Loading, *, what: str = "training data"
) -> Batches[Batch]:
    """Batches of inputs; labels are never looked at.

    `data` is a DataLoader, a Dataset, a tensor or array of shape (N, ...), or any iterable. A one-shot
    iterator is kept in memory as it is drawn, so that it lasts several epochs (`Replay`).

    Iteration raises:
        SourceError: no batch, an item that cannot be loaded or has the wrong form.
    """
    layout = Layout(form, "dropped", what)
    return Batches(data, layout, lambda record: Batch(record.args, record.kwargs), loading)


def labelled_batches(data: Any, form: Form, loading: Loading) -> Batches[tuple[Batch, Any]]:
    """(batch, target) pairs of training data.

    The target is the element behind the inputs of a tuple, or the first of the keys label, labels,
    target, targets of a dict. Otherwise as `input_batches`.

    Iteration raises:
        SourceError: as `input_batches`, and where an item has no target.
    """
    return Batches(data, Layout(form, "needed", "training data"), _with_target, loading)


def evaluation_batches(data: Any, form: Form, loading: Loading) -> Batches[tuple[Batch, Any]]:
    """(batch, target) pairs of evaluation data; the target of items that hold inputs alone is None.

    Iteration raises:
        SourceError: as `input_batches`, and where an item holds something beside inputs that is no target.
    """
    return Batches(data, Layout(form, "kept", "evaluation data"), _with_target, loading)


def _with_target(record: Record) -> tuple[Batch, Any]:
    return Batch(record.args, record.kwargs), record.target


def _generators_of(data: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers draw from, but for torch's own."""
    if not isinstance(data, DataLoader):
        return []
    batch_sampler = data.batch_sampler
    holders = (data, data.sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    distinct = {id(one): one for one in found if isinstance(one, torch.Generator)}
    return [one for one in distinct.values() if one is not torch.default_generator]


def _is_array(data: Any) -> TypeGuard[Tensor | np.ndarray[Any, Any]]:
    return isinstance(data, Tensor | np.ndarray) and data.ndim > 0


def _is_map_style(data: Any) -> bool:
    if isinstance(data, DataLoader | IterableDataset | Mapping | str | type | Tensor | np.ndarray):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _raise_loading_error(error: Exception, what: str, index: int) -> NoReturn:
    location = user_line(error)
    from_worker = str(error).startswith("Caught ")
    if from_worker:
        # The frames hold the loader's iterator, and with it the worker processes.
        traceback.clear_frames(error.__traceback__)
    if isinstance(error, SourceError):
        if from_worker:
            raise SourceError(short(error).removeprefix("SourceError: ")) from error
        raise error
    at = f" at {location}" if location else ""
    raise SourceError(
        f"the {what} cannot be loaded: batch {index} fails with {short(error)}{at}, "
        "so see that every item loads and has the same shape",
        location=location,
    ) from error
