"""Items of the user's data: which part is inputs, which is labels, and whether one is a batch.

An item is a tensor, a tuple (inputs first, then labels), or a dict (inputs by name, the rest are
labels). It is a ready batch where its first tensor has as many axes as the example input, and a
single sample, to be collated, where it has one less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from sqakd_fx.diagnostics.batch_errors import require_dense
from sqakd_fx.errors import SourceError
from sqakd_fx.frontend.example_call import Call

TARGET_KEYS = ("label", "labels", "target", "targets")


class Record(NamedTuple):
    """An item, divided; `labelled` says whether it held more than inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    labelled: bool


@dataclass(frozen=True)
class Form:
    """What the model takes of an item.

    Attributes:
        n_inputs: how many leading elements of a tuple are inputs.
        input_names: the keys of a dict that are inputs.
        example_ndim: axes of the example's first input. None: a Dataset gives samples, any other
            iterable gives batches.
    """

    n_inputs: int
    input_names: tuple[str, ...]
    example_ndim: int | None = None


def form_of(call: Call) -> Form:
    """Items like the example of a model."""
    return Form(call.n_inputs, call.input_names, call.ndim)


@dataclass(frozen=True)
class Layout:
    """How an item divides into inputs and labels, what becomes of the labels, and what a batch looks like."""

    form: Form
    targets: Literal["needed", "kept", "dropped"]
    what: str

    def split(self, item: Any) -> Record:
        record = self._from_mapping(item) if isinstance(item, Mapping) else self._from_tuple(item)
        if self.targets == "dropped":
            return record._replace(target=None)
        if record.target is None and (self.targets == "needed" or record.labelled):
            raise SourceError(
                f"the {self.what} gives items without a label: give tuples with the label "
                f"behind the inputs, or dicts with one of the keys {', '.join(TARGET_KEYS)}"
            )
        return record

    def is_sample(self, record: Record, *, unknown: bool) -> bool:
        """True for one sample, False for a batch; `unknown` where there is no example."""
        ndim = self._ndim(record)
        if self.form.example_ndim is None:
            return unknown
        if ndim == self.form.example_ndim - 1:
            return True
        self.require_batch(record)
        return False

    def require_batch(self, record: Record) -> None:
        ndim = self._ndim(record)
        wanted = self.form.example_ndim
        if wanted is not None and ndim != wanted:
            raise SourceError(
                f"the {self.what} gives a tensor with {ndim} axes where the example input has "
                f"{wanted}: give batches of that form, or samples with one axis less"
            )

    def _from_mapping(self, item: Mapping[Any, Any]) -> Record:
        names = self.form.input_names
        kwargs = {name: _input(item[name]) for name in names if name in item}
        if not kwargs:
            raise SourceError(
                f"the {self.what} gives dicts with the keys {', '.join(map(str, item))}, none of "
                f"which is an input of the model ({', '.join(names) or 'it has no names'}): "
                "rename the keys"
            )
        keys = [key for key in TARGET_KEYS if key in item and key not in kwargs]
        target = _tensor(item[keys[0]]) if keys else None
        return Record((), kwargs, target, len(kwargs) < len(item))

    def _from_tuple(self, item: Any) -> Record:
        elements = item if isinstance(item, tuple | list) else (item,)
        if self._begins_with_inputs(elements):
            inputs, rest = elements[0], elements[1:]
            record = (
                self._from_mapping(inputs)
                if isinstance(inputs, Mapping)
                else self._from_tuple(inputs)
            )
            return record._replace(target=_tensor(rest[0]) if rest else None, labelled=bool(rest))
        count = self.form.n_inputs or len(self.form.input_names) or 1
        if len(elements) < count:
            raise SourceError(
                f"the {self.what} gives items with {len(elements)} elements, but the model takes "
                f"{count} inputs: give all of them, in the order of the model's arguments"
            )
        rest = elements[count:]
        args = tuple(_input(element) for element in elements[:count])
        return Record(args, {}, _tensor(rest[0]) if rest else None, bool(rest))

    def _begins_with_inputs(self, elements: Sequence[Any]) -> bool:
        """Whether the first element holds all inputs of the model: a dict of them, or a tuple of two or more."""
        first = elements[0] if 0 < len(elements) <= 2 else None
        if isinstance(first, Mapping):
            return any(name in first for name in self.form.input_names)
        count = self.form.n_inputs
        return isinstance(first, tuple | list) and count > 1 and len(first) == count

    def _ndim(self, record: Record) -> int:
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
    if not isinstance(tensor, Tensor):
        return tensor
    tensor = tensor.clone() if tensor.is_inference() else tensor.detach()
    return tensor.float() if tensor.is_floating_point() else tensor


def _tensor(value: Any) -> Any:
    if isinstance(value, Tensor):
        require_dense(value, "data")
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.array(value))
    return value


def collate_items(layout: Layout, items: list[Any]) -> Record:
    return collated([layout.split(item) for item in items])


def collated(records: list[Record]) -> Record:
    first = records[0]
    columns = zip(*(r.args for r in records), strict=True)
    args = tuple(_input(default_collate(list(column))) for column in columns)
    kwargs = {k: _input(default_collate([r.kwargs[k] for r in records])) for k in first.kwargs}
    target = None if first.target is None else default_collate([r.target for r in records])
    return Record(args, kwargs, target, first.labelled)
