"""The layers of a student whose weights are on a grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from sqakd_fx.errors import PassError
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Op, op_of
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer, the quantizer of its weight, and the weight in front of that, which has the name `weight_name`."""

    node: fx.Node
    op: Op
    quantizer: Quantizer
    weight: Tensor
    weight_name: str


def require_ranges(graph_module: fx.GraphModule) -> None:
    """Raise PassError where a quantizer is not calibrated."""
    for name, quantizer in quantizers_of(graph_module).items():
        if not quantizer.enabled:
            raise PassError(f"the quantizer {name} has no range: calibrate the student first")


def quantized_layers(graph_module: fx.GraphModule) -> Iterator[QuantizedLayer]:
    """In the order of the graph, whether their inputs are on a grid or in float."""
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        op = op_of(node, modules)
        if op is None or op.weight is None or not meta.has_quantized_weight(node):
            continue
        call = node.args[op.weight]
        assert isinstance(call, fx.Node)
        (source,) = call.all_input_nodes
        quantizer, weight = modules[str(call.target)], constant_of(graph_module, source)
        assert isinstance(quantizer, Quantizer)
        assert weight is not None
        yield QuantizedLayer(node, op, quantizer, weight, str(source.target))
