"""What the layers of a graph read: statistics of each input channel over a few unlabelled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.ir.op_table import Kind, Op, op_of


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Of one layer's input channels: max |x|, E[x] and E[x²], float32 of shape (channels,)."""

    largest: Tensor
    mean: Tensor
    square: Tensor


class StatisticsCollector:
    """Runs a graph batch by batch and keeps what its layers with a weight read, by the layer's name."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.sums: dict[str, _Sums] = {}
        self.watching = LayerInputs(graph_module, self._see)

    def run(self, *inputs: Any) -> Any:
        """One batch: the inputs in the order of the graph's placeholders; returns what the graph gives."""
        with torch.no_grad():
            return self.watching.run(*inputs)

    def statistics(self) -> dict[str, InputStatistics]:
        """Over all batches so far."""
        return {
            name: InputStatistics(
                one.largest, (one.total / one.count).float(), (one.squares / one.count).float()
            )
            for name, one in self.sums.items()
        }

    def _see(self, node: fx.Node, op: Op, value: Tensor) -> None:
        rows = value.movedim(1 if op.is_convolution else -1, 0).flatten(1)
        if node.name not in self.sums:
            zero = rows.new_zeros(len(rows))
            self.sums[node.name] = _Sums(zero, zero.double(), zero.double(), 0)
        self.sums[node.name].add(rows)


def input_statistics(
    graph_module: fx.GraphModule, batches: Iterable[tuple[Any, ...]]
) -> Mapping[str, InputStatistics]:
    """What every convolution and linear layer of a graph in evaluation reads; {} where there is no batch.

    Raises:
        SourceError: the model does not take a batch.
    """
    collector = StatisticsCollector(graph_module)
    for count, inputs in enumerate(batches):
        with batch_named(f"batch {count} of the data", inputs):
            collector.run(*inputs)
    return collector.statistics()


@dataclass
class _Sums:
    largest: Tensor
    total: Tensor
    squares: Tensor
    count: int

    def add(self, rows: Tensor) -> None:
        """`rows`: float32 of shape (channels, values)."""
        self.largest = torch.maximum(self.largest, rows.abs().amax(1))
        self.total += rows.sum(1, dtype=torch.float64)
        self.squares += rows.square().sum(1, dtype=torch.float64)
        self.count += rows.shape[1]


class LayerInputs(fx.Interpreter):
    """Runs a graph node by node, and shows what each convolution and linear layer reads, where it is floats."""

    def __init__(
        self, graph_module: fx.GraphModule, see: Callable[[fx.Node, Op, Tensor], None]
    ) -> None:
        super().__init__(graph_module)
        modules: dict[str, nn.Module] = dict(graph_module.named_modules())
        self.see = see
        self.layers: dict[fx.Node, Op] = {}
        for node in graph_module.graph.nodes:
            op = op_of(node, modules)
            if op is not None and op.kind is Kind.COMPUTE and op.weight is not None:
                self.layers[node] = op

    def run_node(self, node: fx.Node) -> Any:
        op = self.layers.get(node)
        if op is not None and node.args and isinstance(node.args[0], fx.Node):
            value = self.env[node.args[0]]
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                self.see(node, op, value.detach().float())
        return super().run_node(node)
