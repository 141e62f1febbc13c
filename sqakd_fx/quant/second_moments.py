"""E[x xᵀ] of what each layer multiplies with one row of its weight, over a few unlabelled batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.ir.op_table import Kind, Op, op_of
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.quant.output_error import behind_quantizer
from sqakd_fx.quant.sampling import spread_sample

LONGEST_ROW = 4608
"""Weights of an output channel. Their moments are 85 MB."""
_POSITIONS = 4096
"""Of a batch, at most."""


def second_moments(
    graph_module: fx.GraphModule, batches: Iterable[tuple[Any, ...]]
) -> Mapping[str, Tensor]:
    """By layer E[x xᵀ], float32 of shape (groups, K, K), where a row of the weight has K elements.

    Linear layers and convolutions of one and two axes are there whose rows have at most 4608 weights. The graph runs as
    it is: in float, where its quantizers are off.

    Raises:
        SourceError: the model does not take a batch.
    """
    watching = _Watching(graph_module)
    for count, inputs in enumerate(batches):
        with batch_named(f"batch {count} of the data", inputs), torch.no_grad():
            watching.run(*inputs)
    return {name: total / watching.counts[name] for name, total in watching.totals.items()}


class _Watching(fx.Interpreter):
    """Runs a graph node by node and sums up products of what layers read."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        modules: dict[str, nn.Module] = dict(graph_module.named_modules())
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.weights: dict[fx.Node, Tensor] = {}
        for node in graph_module.graph.nodes:
            op = op_of(node, modules)
            if op is None or op.kind is not Kind.COMPUTE or op.weight is None:
                continue
            weight = constant_of(graph_module, behind_quantizer(node.args[op.weight], modules))
            if weight is not None and _has_rows(op, weight):
                self.weights[node] = weight

    def run_node(self, node: fx.Node) -> Any:
        if node in self.weights and isinstance(node.args[0], fx.Node):
            value = self.env[node.args[0]]
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                self._see(node, value.detach().float())
        return super().run_node(node)

    def _see(self, node: fx.Node, value: Tensor) -> None:
        weight = self.weights[node]
        rows = value.reshape(1, -1, value.shape[-1]).transpose(1, 2)
        if weight.ndim > 2:
            rows = _unfolded(node, value, weight)
        groups = len(rows)
        rows = torch.unflatten(spread_sample(rows.flatten(0, 1), _POSITIONS), 0, (groups, -1))
        products = torch.bmm(rows, rows.transpose(1, 2))
        self.totals[node.name] = self.totals.get(node.name, torch.zeros_like(products)) + products
        self.counts[node.name] = self.counts.get(node.name, 0) + rows.shape[2]


def _has_rows(op: Op, weight: Tensor) -> bool:
    plain = (
        weight.ndim in (3, 4) and op.channel_axis == 0 if op.is_convolution else weight.ndim == 2
    )
    return plain and weight[0].numel() <= LONGEST_ROW


def _unfolded(node: fx.Node, value: Tensor, weight: Tensor) -> Tensor:
    """What a convolution multiplies with its rows: (groups, K, positions)."""
    stride, padding, dilation, groups = node.args[3:7]
    kernel = tuple(weight.shape[2:])
    if weight.ndim == 3:
        value, kernel = value.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, _one(stride)), (0, _one(padding)), (1, _one(dilation))
    columns = F.unfold(value, kernel, dilation, padding, stride)  # type: ignore[arg-type]
    parts: Tensor = torch.unflatten(columns, 1, (int(groups), -1))  # type: ignore[arg-type]
    return parts.permute(1, 2, 0, 3).flatten(2)


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, (tuple, list)) else value)
