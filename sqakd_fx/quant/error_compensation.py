"""Rounding of a row of weights in which each weight makes up for the rounding of those before it.

Source: OBQ (Frantar 2022, equations 3 and 4) in the fixed order and Cholesky form of GPTQ (Frantar 2023, algorithm 1).
Over the inputs x of a row w with H = E[x xᵀ], the error E[((w - w̃) x)²] is (w - w̃) H (w - w̃)ᵀ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_DAMPING = 0.01
"""Of the mean of H's diagonal, which keeps H invertible."""
_BLOCK = 64
"""Columns whose effect on all later ones is applied at once."""

Rounding = Callable[[Tensor], Tensor]
"""From a column of weights, (groups, rows), to the values of their grid, of the same shape."""


def compensated(weight: Tensor, moment: Tensor, nearest: Rounding) -> Tensor:
    """The weights which, rounded to the nearest codes, have made up for one another's rounding.

    Args:
        weight: float32 of shape (groups, rows, K).
        moment: H of each group, float32 of shape (groups, K, K).
        nearest: rounds a column.

    Returns:
        float32 of the shape of `weight`. The weights that multiply most are rounded first.
    """
    order = moment.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    across = order[:, None, :]
    work = weight.gather(2, across.expand_as(weight))
    upper = _upper_factor(_ordered(moment, order))
    targets = torch.empty_like(work)
    for start in range(0, work.shape[2], _BLOCK):
        stop = min(start + _BLOCK, work.shape[2])
        errors = torch.empty_like(work[:, :, start:stop])
        for column in range(start, stop):
            wanted = work[:, :, column].clone()
            targets[:, :, column] = wanted
            error = (wanted - nearest(wanted)) / upper[:, column, column, None]
            work[:, :, column:stop] -= error[:, :, None] * upper[:, column, None, column:stop]
            errors[:, :, column - start] = error
        work[:, :, stop:] -= torch.bmm(errors, upper[:, start:stop, stop:])
    return targets.gather(2, order.argsort(dim=1)[:, None, :].expand_as(targets))


def row_errors(difference: Tensor, moment: Tensor) -> Tensor:
    """(w - w̃) H (w - w̃)ᵀ of each row: (groups, rows), from (groups, rows, K) and (groups, K, K)."""
    return (torch.bmm(difference, moment) * difference).sum(dim=2)


def _ordered(moment: Tensor, order: Tensor) -> Tensor:
    rows = moment.gather(1, order[:, :, None].expand_as(moment))
    return rows.gather(2, order[:, None, :].expand_as(moment))


def _upper_factor(moment: Tensor) -> Tensor:
    """U of H⁻¹ = Uᵀ U, with H's diagonal raised; float32 of shape (groups, K, K).

    With H = R Rᵀ, R upper triangular, U is R⁻¹. The raised diagonal bounds the condition by 100 K, which float32 holds
    but for rare H.
    """
    diagonal = moment.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    raised = torch.where(mean > 0, _DAMPING * mean, 1.0).expand_as(diagonal)
    turned = (moment + torch.diag_embed(raised)).flip(1, 2)
    lower, failed = torch.linalg.cholesky_ex(turned)
    if bool(failed.any()):
        lower = torch.linalg.cholesky(turned.double()).float()
    return _inverse_of_upper(lower.flip(1, 2))


def _inverse_of_upper(upper: Tensor) -> Tensor:
    """The inverse of upper triangular matrices (groups, K, K), by halves."""
    size = upper.shape[-1]
    if size <= _BLOCK:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device).expand_as(upper)
        small: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return small
    half = size // 2
    first = _inverse_of_upper(upper[:, :half, :half])
    last = _inverse_of_upper(upper[:, half:, half:])
    inverse = torch.zeros_like(upper)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, last
    inverse[:, :half, half:] = -torch.bmm(torch.bmm(first, upper[:, :half, half:]), last)
    return inverse
