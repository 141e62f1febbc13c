"""Weights that are stored in codes and read in float: of layers in float, of recurrent layers, and tables."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from sqakd_fx.ir import meta
from sqakd_fx.ir.quantized_tensors import QuantizedTensor
from sqakd_fx.passes.lower_to_integer.state import Lowering
from sqakd_fx.quant.quantizer import Quantizer

_OPS = torch.ops.sqakd_fx


def layer_in_float(lowering: Lowering, node: fx.Node) -> fx.Node:
    """A layer in float whose weight is stored in codes."""
    path = meta.module_path(node) or node.name
    _read_in_float(lowering, f"{path}.weight", cast(fx.Node, node.args[1]))
    return lowering.copied(node)


def recurrent_in_float(lowering: Lowering, node: fx.Node) -> fx.Node:
    """A recurrent layer in float whose weights are stored in codes; layers with the same weights share them."""
    for read in node.all_input_nodes:
        weight = read.op == "call_module" and isinstance(
            lowering.modules[str(read.target)], Quantizer
        )
        source = read.args[0] if weight else None
        if isinstance(source, fx.Node) and source.op == "get_attr" and read not in lowering.floats:
            _read_in_float(lowering, str(source.target), read)
    return lowering.copied(node)


def _read_in_float(lowering: Lowering, name: str, read: fx.Node) -> None:
    """Codes times scales for a quantized weight."""
    quantizer = cast(Quantizer, lowering.modules[str(read.target)])
    stored = _stored(lowering, name, quantizer, cast(fx.Node, read.args[0]))
    lowering.floats[read] = lowering.graph.call_function(
        _OPS.dequantize_weight.default, (*stored, quantizer.axis or 0)
    )


def looked_up_rows(lowering: Lowering, node: fx.Node) -> fx.Node:
    """The rows of a table of codes; a layer with the same weight reads the same codes."""
    indices, rows = cast(tuple[fx.Node, fx.Node], node.args)
    quantizer = cast(Quantizer, lowering.modules[str(rows.target)])
    source = cast(fx.Node, rows.args[0])
    codes, scale = _stored(lowering, str(source.target), quantizer, source)
    for layer in lowering.student.graph.nodes:
        if meta.layer(layer) is not None and any(
            x.op == "call_module" and x.target == rows.target for x in layer.all_input_nodes
        ):
            lowering.built.share(f"{meta.module_path(layer) or layer.name}.weight", codes)
    read = (lowering.float_of(indices), codes, scale)
    new = lowering.graph.call_function(_OPS.look_up.default, read)
    new.meta = dict(node.meta)
    return new


def _stored(
    lowering: Lowering, name: str, quantizer: Quantizer, source: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """INT8 codes and scales of a weight that a float operation reads."""
    weight = lowering.constant(source)
    values, grid = quantizer.codes(weight).to(torch.int8), quantizer.grid(weight)
    codes = lowering.built.weight(name, str(source.target), values)
    least, most = int(values.min()), int(values.max())
    granularity = "tensor" if grid.axis is None else "channel"
    tensor = QuantizedTensor(name, grid.bits, least, most, quantizer.family.name, granularity)
    meta.set_quantized_tensor(codes, tensor)
    return codes, lowering.built.buffer(f"{name}_scale", grid.scale)
