"""The sizes of an example that torch.export is to leave open: the batch, and the recipe's free axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqakd_fx.recipe.free_axes import FreeAxes, of_each


def dynamic_shapes(
    example: Sequence[Any], batch_axis: int | None, free_axes: FreeAxes = ()
) -> tuple[dict[int, Any] | None, ...]:
    """For each input its open axes; `batch_axis` is None where the batch has a fixed size."""
    first = [] if batch_axis is None else [batch_axis]
    return tuple(
        dict.fromkeys([*first, *axes], torch.export.Dim.DYNAMIC)
        if isinstance(x, Tensor) and x.ndim
        else None
        for x, axes in zip(example, of_each(free_axes, len(example)), strict=True)
    )
