"""Calls of other sizes than the example's, made of the example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sqakd_fx.recipe.free_axes import FreeAxes, free_sizes, other_sizes


def resized(
    example: Sequence[Tensor], free: FreeAxes, sizes: Mapping[str, int]
) -> tuple[Tensor, ...]:
    """The example at other `sizes` of its free axes: what is added repeats what is there."""
    made = []
    for x, axes in zip(example, free, strict=True):
        for axis, called in axes.items():
            places = torch.arange(sizes[called]) % x.shape[axis]
            x = x.index_select(axis, places)
        made.append(x)
    return tuple(made)


def at_other_sizes(example: Sequence[Tensor], free: FreeAxes) -> list[tuple[Tensor, ...]]:
    """The example at three other choices of sizes; none where no axis is free."""
    sizes = free_sizes(free, [tuple(x.shape) for x in example])
    if not sizes:
        return []
    return [resized(example, free, chosen) for chosen in other_sizes(sizes)]


def shapes_in_words(tensors: Iterable[Tensor]) -> str:
    """The whole shapes of one call's tensors."""
    return " and ".join("×".join(map(str, x.shape)) for x in tensors)
