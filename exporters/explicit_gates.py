"""Gates of hard-swish for formats in which a tensor has one scale.

    Before:  g = add(x, 3) at 6 / 255, codes;  y = mul(x, g read at 1 / 255)
    After:   g = quantize(clip(x + 3, 0, 6)) at 6 / 255;  y = quantize(x · dequantize(g) / 6)

In the container a DequantizeLinear reads codes with a scale of its own, which costs nothing and divides by 6.
Encodings, QONNX and torch's pairs know one scale for each tensor. Saturation of codes has to be seen in their floats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sqakd_fx.ir.rewriting import get_attribute

_OPS = torch.ops.sqakd_fx
_GRID = slice(6, 10)
"""Scale, zero point, smallest and largest code of what a sum or a product gives, among its arguments."""


def with_explicit_gates(lowered: fx.GraphModule) -> fx.GraphModule:
    """The integer program itself where it has no such gate, else a copy that shares its tensors."""
    if not any(_gate_of(lowered, node) for node in lowered.graph.nodes):
        return lowered
    graph = fx.Graph()
    end = graph.graph_copy(lowered.graph, {})
    graph.output(end).meta = dict(lowered.graph.output_node().meta)
    made = fx.GraphModule(lowered, graph)
    made.meta = dict(lowered.meta)
    for node in list(made.graph.nodes):
        gate = _gate_of(made, node)
        if gate is not None:
            _spell(made, node, gate)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def _gate_of(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The sum of codes that a product reads with another scale than its own."""
    if node.target is not _OPS.mul.default:
        return None
    gate, scale = node.args[3:5]
    if not isinstance(gate, fx.Node) or gate.target is not _OPS.add.default:
        return None
    made, read = (_tensor(graph_module, one) for one in (gate.args[6], scale))
    return None if torch.equal(made, read) else gate


def _spell(graph_module: fx.GraphModule, product: fx.Node, gate: fx.Node) -> None:
    """Write a product and its gate as float operations between codes."""
    graph = graph_module.graph
    three, step, offset = (_tensor(graph_module, one).float() for one in gate.args[3:6])
    made, zero = (_tensor(graph_module, one).float() for one in gate.args[6:8])
    read = _tensor(graph_module, product.args[4])
    smallest, largest = (float((code - zero) * made) for code in gate.args[8:10])  # type: ignore[operator]

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    with graph.inserting_before(product):
        x = call(_OPS.dequantize.default, *product.args[:3])
        shifted = call(torch.add, x, float((three - offset) * step))
        clipped = call(torch.clamp, shifted, smallest, largest)
        codes = call(_OPS.quantize.default, clipped, *gate.args[_GRID])
        floats = call(_OPS.dequantize.default, codes, *gate.args[6:8])
        gated = call(torch.mul, x, call(torch.mul, floats, float(read / made)))
        result = call(_OPS.quantize.default, gated, *product.args[_GRID])
    codes.meta, result.meta = dict(gate.meta), dict(product.meta)
    product.replace_all_uses_with(result)
    graph.erase_node(product)


def _tensor(graph_module: fx.GraphModule, node: Any) -> Tensor:
    value: Tensor = get_attribute(graph_module, str(node.target))
    return value
