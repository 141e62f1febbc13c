"""The form of `pt2e` that LiteRT's converter takes: weights are floats behind a quantize and a dequantize.

    Before:  layer(x, dequantize(codes))
    After:   layer(x, dequantize(quantize(floats)))

The floats are what the codes stand for, so that the converter finds the same codes again and stores those.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from sqakd_fx.ir.rewriting import constant_of, drop_unused, set_attribute

_Q = torch.ops.quantized_decomposed
_QUANTIZE = {
    _Q.dequantize_per_tensor.default: _Q.quantize_per_tensor.default,
    _Q.dequantize_per_channel.default: _Q.quantize_per_channel.default,
}


def quantized_weights(made: fx.GraphModule) -> fx.GraphModule:
    """Stored codes as floats that are quantized in the graph, in place. Every code stays the same."""
    for dequantize, quantize in _QUANTIZE.items():
        for node in made.graph.find_nodes(op="call_function", target=dequantize):
            codes = constant_of(made, node.args[0])
            if codes is None:
                continue
            numbers = node.args[1:]
            name = f"{cast(fx.Node, node.args[0]).target}_real"
            with torch.no_grad():
                real = dequantize(codes, *(_value(made, x) for x in numbers))
            with made.graph.inserting_before(node):
                stored = made.graph.get_attr(set_attribute(made, name, real))
                behind = made.graph.call_function(quantize, (stored, *numbers))
            node.args = (behind, *numbers)
    made.graph.eliminate_dead_code()
    drop_unused(made)
    made.recompile()
    return made


def _value(made: fx.GraphModule, argument: Any) -> Tensor | Any:
    return constant_of(made, argument) if isinstance(argument, fx.Node) else argument
