"""Products, quotients, sums and differences of a value and a constant, as one affine function of the value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqakd_fx.ir.op_table import Kind, Op, op_of
from sqakd_fx.ir.rewriting import constant_of


@dataclass(frozen=True)
class ConstantAffine:
    """factor * value + summand; both float32, of the one shape that broadcasts against the value."""

    value: fx.Node
    factor: Tensor
    summand: Tensor


def constant_affine(graph_module: fx.GraphModule, node: fx.Node) -> ConstantAffine | None:
    """What `node` does to a value beside a finite constant, a number or a stored tensor; None for all else."""
    op = op_of(node, {}) if node.op == "call_function" else None
    if op is None or node.kwargs or len(node.args) != 2:
        return None
    commutes = op.commutes and not op.divides
    for value, other in [node.args, node.args[::-1]] if commutes else [node.args]:
        constant = _constant(graph_module, other)
        if isinstance(value, fx.Node) and constant is not None:
            return _affine(op, value, constant)
    return None


def _constant(graph_module: fx.GraphModule, given: object) -> Tensor | None:
    if isinstance(given, int | float) and not isinstance(given, bool):
        return torch.tensor(float(given)) if math.isfinite(given) else None
    stored = constant_of(graph_module, given)
    if stored is None or not stored.is_floating_point() or not bool(stored.isfinite().all()):
        return None
    return stored.detach().float()


def _affine(op: Op, value: fx.Node, constant: Tensor) -> ConstantAffine | None:
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    if op.kind is Kind.PRODUCT:
        return ConstantAffine(value, constant, zero)
    if op.kind is Kind.SUM:
        return ConstantAffine(value, one, -constant if op.is_difference else constant)
    if op.divides and bool(constant.reciprocal().isfinite().all()):
        return ConstantAffine(value, constant.reciprocal(), zero)
    return None
