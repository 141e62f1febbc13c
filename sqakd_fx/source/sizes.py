"""Batches of other sizes than the example's: images of several heights and widths, texts of several lengths.

Every axis of an exported file is fixed but the batch and those that the recipe frees. A graph that computes the model
at other sizes as well is trained on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from sqakd_fx.diagnostics.wording import first_of
from sqakd_fx.errors import SourceError
from sqakd_fx.frontend.caches import outputs_alone
from sqakd_fx.frontend.copy_model import float_copy
from sqakd_fx.frontend.float32 import in_float32
from sqakd_fx.ir.batches import samples_in
from sqakd_fx.ir.outputs import largest_difference, tensors_of
from sqakd_fx.program import Program
from sqakd_fx.recipe.free_axes import FreeAxes, of_each
from sqakd_fx.source.source import Source

_LARGEST_DIFFERENCE = 1e-3
_SHOWN = 4


class HasExample(Protocol):
    """What a graph takes: the names of its inputs, and those of one call."""

    @property
    def input_names(self) -> tuple[str, ...]: ...

    @property
    def example(self) -> tuple[Tensor, ...]: ...

    @property
    def free_axes(self) -> FreeAxes: ...


def has_example_size(program: HasExample, batch: tuple[Any, ...]) -> bool:
    """Whether the exported file takes a batch: axes but the batch and free ones are as long as the example's."""
    return _other_size(program, batch) is None


def _other_size(program: HasExample, batch: tuple[Any, ...]) -> tuple[str, str, str] | None:
    """(input, its size, the size that the file takes) of the first input that the file does not take."""
    free = of_each(program.free_axes, len(program.example))
    for name, given, wanted, axes in zip(
        program.input_names, batch, program.example, free, strict=False
    ):
        if isinstance(given, Tensor) and _size(given, axes) != _size(wanted, axes):
            return name, _size(given), _size(wanted, axes)
    return None


def _size(x: Tensor, free: Mapping[int, str] = MappingProxyType({})) -> str:
    """The sizes behind the batch, with names for those that are free."""
    sizes = [free.get(axis, str(size)) for axis, size in enumerate(x.shape)]
    return "×".join(sizes[1:]) or "no axes"


def require_example_size(program: HasExample, batch: tuple[Any, ...], what: str) -> None:
    """Raise SourceError where the exported file does not take a batch."""
    if other := _other_size(program, batch):
        name, given, wanted = other
        raise SourceError(
            f"the {what} gives {name!r} of {given}, and the exported file takes {wanted} only, as the example has it: "
            "resize or pad the samples to that size, or give example_inputs() of another"
        )


def require_batch_size(program: Program, batch: tuple[Any, ...], what: str) -> None:
    """Raise SourceError where a batch has not the number of samples that alone the model takes."""
    wanted = batch_size_of(program)
    samples = samples_in(batch, wanted)
    if program.traced.fixed_batch and samples != wanted:
        raise SourceError(
            f"the {what} has a batch of {samples}, and the model takes the example's batch size of {wanted} only: give "
            "batches of that size, or example_inputs() of another"
        )


def batch_size_of(program: Program) -> int:
    """Samples a batch, where the data is not batched: the recipe's, or the only size that the model takes."""
    if not program.traced.fixed_batch:
        return program.recipe.batch_size
    return samples_in(program.example, 1)


class Sizes:
    """The sizes of the training data, as its first batches come.

    `reference` is called as the model is, with a batch's arguments, and gives its output.
    """

    def __init__(self, program: Program, reference: Callable[..., Any] | None) -> None:
        self._program = program
        self._reference = reference
        self._others: dict[tuple[str, str, str], None] = {}
        self._free: set[tuple[str, str, str]] = set()
        self._fitting = 0

    def see(self, batch: tuple[Any, ...]) -> None:
        """Raises SourceError where the graph is not the model at the size of a batch."""
        require_batch_size(self._program, batch, "training data")
        other = _other_size(self._program, batch)
        if other is None:
            self._fitting += 1
            self._require_model_at_free_sizes(batch)
        elif other not in self._others:
            self._require_model(batch, other)
            self._others[other] = None

    def _require_model_at_free_sizes(self, batch: tuple[Any, ...]) -> None:
        pairs = zip(self._program.input_names, batch, self._program.example, strict=False)
        for name, given, wanted in pairs:
            size = (name, _size(given), _size(wanted)) if isinstance(given, Tensor) else None
            if size is not None and size[1] != size[2] and size not in self._free:
                self._free.add(size)
                self._require_model(batch, size)

    def sentence(self) -> str | None:
        """What to tell of other sizes, where there are any.

        Raises:
            SourceError: no batch has the example's size, so none can be held against the exported file.
        """
        if not self._others:
            return None
        name, _, wanted = next(iter(self._others))
        sizes = [given for _, given, _ in self._others]
        shown = first_of(sizes, _SHOWN)
        if not self._fitting:
            raise SourceError(
                f"the training data gives {name!r} of {shown}, never of the example's {wanted}, and the exported "
                "file takes the example's size only: give example_inputs() of a size that the data has"
            )
        return (
            f"the training data gives {name!r} of {shown} beside the example's {wanted}: all are trained on; the "
            f"exported file takes {wanted} only, and batches of that size validate it"
        )

    def _require_model(self, batch: tuple[Any, ...], other: tuple[str, str, str]) -> None:
        if self._reference is None:
            return
        few = tuple(x[:2] if isinstance(x, Tensor) and x.ndim else x for x in batch)
        teacher = self._program.teacher
        try:
            with torch.no_grad():
                wanted = tensors_of(self._reference(*few))
                got = tensors_of(torch.nn.Module.__call__(teacher, *few))
            same = largest_difference(wanted, got) <= _LARGEST_DIFFERENCE
        except Exception:
            same = False
        if not same:
            name, given, example = other
            raise SourceError(
                f"the training data gives {name!r} of {given}, and the model can be trained at the example's "
                f"{example} only, as it holds for that size: resize or pad the samples to one size, and give "
                "example_inputs() of it"
            )


def sizes_of(source: Source, program: Program) -> Sizes:
    """Sizes that are held against the source's own model, which is copied when the first other size comes."""
    model: list[torch.nn.Module] = []
    call = program.traced.call

    def reference(*tensors: Tensor) -> Any:
        if not model:
            model.append(float_copy(source.model))
        args, kwargs = call.with_tensors(dict(zip(program.input_names, tensors, strict=True)))
        with in_float32():
            output = model[0](*args, **kwargs)
        return outputs_alone(output)

    return Sizes(program, reference)
