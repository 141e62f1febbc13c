"""E[x xᵀ] of what each layer multiplies with one row of its weight, over a few unlabelled batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.ir.op_table import Op
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.quant.input_statistics import LayerInputs
from sqakd_fx.quant.output_error import behind_quantizer
from sqakd_fx.quant.sampling import spread_sample

LONGEST_ROW = 4608
"""Weights of an output channel. Their moments are 85 MB."""
_POSITIONS = 1024
"""Of a batch, at most."""
_MOST_UNFOLDED = 1 << 25
"""Elements that a convolution's input makes when it is unfolded: 128 MB."""


def second_moments(
    graph_module: fx.GraphModule, batches: Iterable[tuple[Any, ...]]
) -> Mapping[str, Tensor]:
    """By layer E[x xᵀ], float32 of shape (groups, K, K), where a row of the weight has K elements.

    Linear layers and convolutions of one and two axes are there whose rows have at most 4608 weights. The graph runs as
    it is: in float, where its quantizers are off.

    Raises:
        SourceError: the model does not take a batch.
    """
    modules = dict(graph_module.named_modules())
    totals: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def see(node: fx.Node, op: Op, value: Tensor) -> None:
        assert op.weight is not None
        weight = constant_of(graph_module, behind_quantizer(node.args[op.weight], modules))
        if weight is None or not _has_rows(op, weight):
            return
        rows = _rows(node, value, weight)
        products = torch.bmm(rows, rows.transpose(1, 2))
        totals[node.name] = totals.get(node.name, torch.zeros_like(products)) + products
        counts[node.name] += rows.shape[2]

    watching = LayerInputs(graph_module, see)
    for count, inputs in enumerate(batches):
        with batch_named(f"batch {count} of the data", inputs), torch.no_grad():
            watching.run(*inputs)
    return {name: total / counts[name] for name, total in totals.items()}


def _has_rows(op: Op, weight: Tensor) -> bool:
    plain = (
        weight.ndim in (3, 4) and op.channel_axis == 0 if op.is_convolution else weight.ndim == 2
    )
    return plain and weight[0].numel() <= LONGEST_ROW


def _rows(node: fx.Node, value: Tensor, weight: Tensor) -> Tensor:
    """What a row of the weight multiplies, at some positions: (groups, K, positions)."""
    rows = value.reshape(1, -1, value.shape[-1]).transpose(1, 2)
    if weight.ndim > 2:
        rows = _unfolded(node, value, weight)
    few = spread_sample(rows.flatten(0, 1), _POSITIONS)
    return torch.unflatten(few, 0, (len(rows), -1))


def _unfolded(node: fx.Node, value: Tensor, weight: Tensor) -> Tensor:
    """What a convolution multiplies with its rows: (groups, K, positions)."""
    stride, padding, dilation, groups = node.args[3:7]
    kernel = tuple(weight.shape[2:])
    if weight.ndim == 3:
        value, kernel = value.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, _one(stride)), (0, _one(padding)), (1, _one(dilation))
    columns = F.unfold(_few_samples(value, kernel), kernel, dilation, padding, stride)  # type: ignore[arg-type]
    parts: Tensor = torch.unflatten(columns, 1, (int(groups), -1))  # type: ignore[arg-type]
    return parts.permute(1, 2, 0, 3).flatten(2)


def _few_samples(value: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """As many samples of a batch as may be unfolded."""
    each = math.prod(value.shape[1:]) * math.prod(kernel)
    return value[: max(1, _MOST_UNFOLDED // each)]


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, (tuple, list)) else value)
