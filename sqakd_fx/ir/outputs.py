"""What a model gives: the tensors of a nested output, the axis of its classes, and how far two outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor in a nested output, in a stable order."""
    leaves = tree_leaves(output)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest |a - b| over pairs of float tensors, relative to the largest |a| where that is > 1.

    Infinite where there are not as many, or where two have other shapes.
    """
    if [x.shape for x in a] != [y.shape for y in b]:
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel():
            scale = max(1.0, float(x.abs().max()))
            worst = max(worst, float((x - y).abs().max()) / scale)
    return worst


def parts_axis(shape: tuple[int, ...], sizes: Sequence[int]) -> int | None:
    """The first axis behind the batch that has the sum of the parts' sizes; None for none."""
    fitting = (axis for axis in range(1, len(shape)) if shape[axis] == sum(sizes))
    return next(fitting, None) if sizes else None


def separated(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The unlike parts of a tensor, along the first axis behind the batch that has their sum; else the tensor."""
    axis = parts_axis(tuple(x.shape), sizes)
    return [x] if axis is None else list(torch.split(x, list(sizes), axis))


def relative_errors(got: Any, wanted: Any, parts: Mapping[int, Sequence[int]]) -> list[list[float]]:
    """|a - b| / |b| of every floating-point output, of each of its parts; `parts` has sizes by number of the tensor."""
    pairs = zip(tensors_of(got), tensors_of(wanted), strict=True)
    return [
        [
            float((a - b).norm() / b.norm().clamp_min(1e-12))
            for a, b in zip(*(separated(x, parts.get(index, ())) for x in pair), strict=True)
        ]
        for index, pair in enumerate(pairs)
        if pair[1].is_floating_point()
    ]


def class_axis(shape: tuple[int, ...]) -> int | None:
    """Where the classes of an output are: (N, C), (N, C, H, W), (N, T, C); None where there are none."""
    if len(shape) == 2:
        return 1 if shape[1] > 1 else None
    if len(shape) == 3:
        return 2
    if len(shape) in (4, 5):
        return 1 if shape[1] > 1 else None
    return None
