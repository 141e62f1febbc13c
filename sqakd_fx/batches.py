"""Batches of model inputs from whatever iterable the user has.

An item is a tensor, a tuple (inputs first, then labels), or a dict (inputs by name, the rest are
labels). It is a ready batch where its first tensor has as many axes as the example input, and a
single sample, to be collated, where it has one less. Samples of data with a length are shuffled;
ready batches are taken in the order in which they come.
"""

from __future__ import annotations

import math
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, IterableDataset, default_collate

from sqakd_fx.code_lines import user_line
from sqakd_fx.errors import SourceError, short

T = TypeVar("T")
TARGET_KEYS = ("label", "labels", "target", "targets")
_OWN = Path(__file__).parent
_STDLIB = Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one call of the model; every tensor has the samples on its first axis."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Replay(Generic[T]):
    """A one-shot iterator made re-iterable: what was drawn is kept in memory and given again.

    Nothing is drawn before it is asked for. Memory grows with the number of items drawn.
    """

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._seen: list[T] = []

    def __iter__(self) -> Iterator[T]:
        index = 0
        while True:
            if index == len(self._seen):
                try:
                    self._seen.append(next(self._source))
                except StopIteration:
                    return
            yield self._seen[index]
            index += 1


class Batches(Generic[T]):
    """A re-iterable over the user's data: each iteration is one epoch.

    `labels_ignored` says whether a batch drawn so far came with labels that were not used.
    """

    def __init__(
        self,
        data: Any,
        layout: _Layout,
        take: Callable[[_Record], T],
        *,
        batch_size: int,
        drop_last: bool,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if isinstance(data, Mapping):
            raise SourceError(
                f"the {layout.what} is one dict with the keys {', '.join(map(str, data))}: "
                "give an iterable of dicts, one a batch or one a sample"
            )
        self._data = replayable(data)
        self._layout = layout
        self._take = take
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._shuffle = shuffle
        self._seed = seed
        self._workers = workers
        self._epoch = 0
        self._samples: bool | None = None
        self._labels_ignored = False

    @property
    def labels_ignored(self) -> bool:
        return self._labels_ignored

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iterations: it depends on (seed, epoch) alone."""
        self._epoch = epoch

    def length(self) -> int | None:
        """Batches in an epoch, or None where the data does not say."""
        data = self._data
        if _is_array(data) or _is_map_style(data):
            total = len(data)
            if total == 0 or not self._holds_samples():
                return total
            if self._drops(total):
                return total // self._batch_size
            return math.ceil(total / self._batch_size)
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

    def _records(self) -> Iterator[_Record]:
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

    def _from_array(self, data: Any) -> Iterator[_Record]:
        order, _ = self._order(len(data))
        for start in range(0, len(data), self._batch_size):
            chosen = order[start : start + self._batch_size]
            if len(chosen) == self._batch_size or not self._drops(len(data)):
                index = chosen.numpy() if isinstance(data, np.ndarray) else chosen.to(data.device)
                yield self._layout.split(data[index])

    def _from_samples(self, data: Any) -> Iterator[_Record]:
        order, generator = self._order(len(data))
        yield from DataLoader(
            data,
            batch_size=self._batch_size,
            sampler=order.tolist(),
            drop_last=self._drops(len(data)),
            generator=generator,
            collate_fn=partial(_collate_items, self._layout),
            num_workers=self._workers,
            pin_memory=self._workers > 0 and torch.cuda.is_available(),
        )

    def _from_items(self, data: Iterable[Any]) -> Iterator[_Record]:
        pending: list[_Record] = []
        full = False
        for item in data:
            record = self._layout.split(item)
            if not self._layout.is_sample(record, unknown=False):
                full = True
                yield record
                continue
            pending.append(record)
            if len(pending) == self._batch_size:
                full = True
                yield _collate(pending)
                pending = []
        if pending and not (self._drop_last and full):
            yield _collate(pending)

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
        return self._drop_last and total >= self._batch_size

    def _order(self, total: int) -> tuple[Tensor, torch.Generator]:
        entropy = np.random.SeedSequence([self._seed % 2**64, self._epoch])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        if self._shuffle:
            return torch.randperm(total, generator=generator), generator
        return torch.arange(total), generator


def input_batches(
    data: Any,
    *,
    n_inputs: int,
    input_names: tuple[str, ...],
    batch_size: int,
    shuffle: bool,
    seed: int,
    example_ndim: int | None = None,
    what: str = "training data",
    workers: int = 0,
) -> Batches[Batch]:
    """Batches of inputs; labels are never looked at.

    Args:
        data: a DataLoader, a Dataset, a tensor or array of shape (N, ...), or any iterable. A
            one-shot iterator is kept in memory as it is drawn, so that it lasts several epochs.
        n_inputs: how many leading elements of a tuple are inputs.
        input_names: the keys of a dict that are inputs.
        batch_size: samples in a batch that is collated here; an incomplete last one is dropped
            unless it is the only one. Ready batches keep their size.
        shuffle: permute samples of data that has a length, anew for each `set_epoch`.
        example_ndim: axes of the example's first input. None: a Dataset gives samples, any other
            iterable gives batches.
        workers: processes that load and collate samples of a Dataset ahead of the training loop; 0: none.

    Iteration raises:
        SourceError: no batch, an item that cannot be loaded or has the wrong form.
    """
    layout = _Layout(n_inputs, input_names, example_ndim, False, what)
    return Batches(
        data,
        layout,
        lambda record: Batch(record.args, record.kwargs),
        batch_size=batch_size,
        drop_last=True,
        shuffle=shuffle,
        seed=seed,
        workers=workers,
    )


def labelled_batches(
    data: Any,
    *,
    n_inputs: int,
    input_names: tuple[str, ...],
    batch_size: int,
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int = 0,
    example_ndim: int | None = None,
    what: str = "evaluation data",
    workers: int = 0,
) -> Batches[tuple[Batch, Any]]:
    """(batch, target) pairs, in the data's own order unless `shuffle`.

    The target is the element behind the inputs of a tuple, or the first of the keys label, labels,
    target, targets of a dict. Otherwise as `input_batches`.

    Iteration raises:
        SourceError: as `input_batches`, and where an item has no target.
    """
    layout = _Layout(n_inputs, input_names, example_ndim, True, what)
    return Batches(
        data,
        layout,
        lambda record: (Batch(record.args, record.kwargs), record.target),
        batch_size=batch_size,
        drop_last=drop_last,
        shuffle=shuffle,
        seed=seed,
        workers=workers,
    )


def replayable(data: Any) -> Any:
    """`data` itself, or for a one-shot iterator a `Replay` of it."""
    return Replay(data) if isinstance(data, Iterator) and iter(data) is data else data


def batch_size(batch: Batch) -> int:
    """Length of the first axis of the batch's first tensor.

    Raises:
        SourceError: the batch has no tensor with an axis.
    """
    for leaf in tree_leaves((batch.args, batch.kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise SourceError("a batch has no tensor with a sample axis: give tensors of shape (N, ...)")


def to_device(batch: Batch, device: torch.device | str, non_blocking: bool = True) -> Batch:
    """The batch with every tensor on `device`."""

    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=non_blocking)

    args, kwargs = tree_map_only(Tensor, move, (batch.args, batch.kwargs))
    return Batch(args, kwargs)


def check_finite(batch: Batch, where: str) -> None:
    """Refuse NaN and infinity in a batch. `where` opens the sentence: "calibration batch 3".

    Raises:
        SourceError: names `where` and the input.
    """
    inputs = {f"input {i}": value for i, value in enumerate(batch.args)}
    inputs |= {f"input {name!r}": value for name, value in batch.kwargs.items()}
    for name, value in inputs.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and not bool(torch.isfinite(leaf).all()):
                raise SourceError(
                    f"{where} has NaN or infinite values in {name}: "
                    "remove these samples from the data or repair its preprocessing"
                )


class _Record(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    labelled: bool


@dataclass(frozen=True)
class _Layout:
    """How an item divides into inputs and labels, and what a batch looks like."""

    n_inputs: int
    names: tuple[str, ...]
    example_ndim: int | None
    needs_target: bool
    what: str

    def split(self, item: Any) -> _Record:
        record = self._from_mapping(item) if isinstance(item, Mapping) else self._from_tuple(item)
        if self.needs_target:
            if record.target is None:
                raise SourceError(
                    f"the {self.what} gives items without a label: give tuples with the label "
                    f"behind the inputs, or dicts with one of the keys {', '.join(TARGET_KEYS)}"
                )
            return record
        return record._replace(target=None)

    def is_sample(self, record: _Record, *, unknown: bool) -> bool:
        """True for one sample, False for a batch; `unknown` where there is no example."""
        ndim = self._ndim(record)
        if self.example_ndim is None:
            return unknown
        if ndim == self.example_ndim - 1:
            return True
        self.require_batch(record)
        return False

    def require_batch(self, record: _Record) -> None:
        ndim = self._ndim(record)
        if self.example_ndim is not None and ndim != self.example_ndim:
            raise SourceError(
                f"the {self.what} gives a tensor with {ndim} axes where the example input has "
                f"{self.example_ndim}: give batches of that form, or samples with one axis less"
            )

    def _from_mapping(self, item: Mapping[Any, Any]) -> _Record:
        kwargs = {name: _input(item[name]) for name in self.names if name in item}
        if not kwargs:
            raise SourceError(
                f"the {self.what} gives dicts with the keys {', '.join(map(str, item))}, none of "
                f"which is an input of the model ({', '.join(self.names) or 'it has no names'}): "
                "rename the keys"
            )
        keys = [key for key in TARGET_KEYS if key in item and key not in kwargs]
        target = _tensor(item[keys[0]]) if keys else None
        return _Record((), kwargs, target, len(kwargs) < len(item))

    def _from_tuple(self, item: Any) -> _Record:
        elements = item if isinstance(item, tuple | list) else (item,)
        count = self.n_inputs or len(self.names) or 1
        if len(elements) < count:
            raise SourceError(
                f"the {self.what} gives items with {len(elements)} elements, but the model takes "
                f"{count} inputs: give all of them, in the order of the model's arguments"
            )
        rest = elements[count:]
        args = tuple(_input(element) for element in elements[:count])
        return _Record(args, {}, _tensor(rest[0]) if rest else None, bool(rest))

    def _ndim(self, record: _Record) -> int:
        values = (*record.args, *record.kwargs.values())
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                return leaf.ndim
        if isinstance(values[0], int | float):
            return 0
        raise SourceError(
            f"the {self.what} gives items of type {type(values[0]).__name__}: "
            "convert them to tensors in the dataset"
        )


def _input(value: Any) -> Any:
    tensor = _tensor(value)
    if isinstance(tensor, Tensor) and tensor.is_floating_point():
        return tensor.float()
    return tensor


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.array(value))
    return value


def _collate_items(layout: _Layout, items: list[Any]) -> _Record:
    return _collate([layout.split(item) for item in items])


def _collate(records: list[_Record]) -> _Record:
    first = records[0]
    columns = zip(*(r.args for r in records), strict=True)
    args = tuple(_input(default_collate(list(column))) for column in columns)
    kwargs = {k: _input(default_collate([r.kwargs[k] for r in records])) for k in first.kwargs}
    target = None if first.target is None else default_collate([r.target for r in records])
    return _Record(args, kwargs, target, first.labelled)


def _is_array(data: Any) -> TypeGuard[Tensor | np.ndarray[Any, Any]]:
    return isinstance(data, Tensor | np.ndarray) and data.ndim > 0


def _is_map_style(data: Any) -> bool:
    if isinstance(data, DataLoader | IterableDataset | Mapping | str | Tensor | np.ndarray):
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
