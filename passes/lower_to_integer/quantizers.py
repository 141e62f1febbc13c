"""A quantizer of activations becomes codes: a requantization, the same codes again, or a quantization."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import op_of
from sqakd_fx.ir.quantized_tensors import QuantizedTensor
from sqakd_fx.ir.rewriting import constant_of, set_attribute
from sqakd_fx.passes.lower_to_integer.clips import clipped_range, is_inside
from sqakd_fx.passes.lower_to_integer.constant_channels import off_ties, reads_alone
from sqakd_fx.passes.lower_to_integer.state import Lowering
from sqakd_fx.passes.lower_to_integer.values import Arithmetic, Codes, Layer, StoredGrid
from sqakd_fx.quant.grid import Grid, encode
from sqakd_fx.quant.quantizer import Quantizer

_OPS = torch.ops.sqakd_fx


def quantized(lowering: Lowering, node: fx.Node, module: Quantizer) -> Any:
    """What a call of a quantizer gives: codes, and of a weight the student's own node."""
    if module.role == "weight":
        return node
    stored = _stored_grid(lowering, str(node.target), module)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = lowering.values[source]
    name = _path(str(node.target))
    if isinstance(value, Layer) and reads_alone(node, value.source):
        value = off_ties(value, stored.grid)
    if isinstance(value, Layer | Arithmetic):
        stored = stored.clipped(*clipped_range(stored.grid, value.clip))
        code = lowering.built.quantized(value, stored)
        code = lowering.built.shaped(value, _tagged(code, name, stored.grid, module))
        meta.set_quantizer_node(code, node.name)
        return Codes(code, stored)
    grid = stored.grid
    if isinstance(value, Codes) and value.grid.same_as(grid) and is_inside(value.grid, grid):
        return value
    constant = constant_of(lowering.student, source)
    if constant is not None:
        codes = encode(constant.detach().float(), grid).to(torch.uint8)
        code = lowering.built.buffer(f"{source.target}_codes", codes)
    else:
        read = _unfused_softmax(lowering, source)
        parameters = lowering.built.grid_parameters(stored)
        code = lowering.graph.call_function(
            _OPS.quantize.default, (read, *parameters, grid.qmin, grid.qmax)
        )
        meta.set_quantizer_node(code, node.name)
    return Codes(_tagged(code, name, grid, module), stored)


def _tagged(node: fx.Node, name: str, grid: Grid, module: Quantizer) -> fx.Node:
    """The node with what the exported file says of its tensor."""
    tensor = QuantizedTensor(
        path=name,
        bits=grid.bits,
        qmin=grid.qmin,
        qmax=grid.qmax,
        family=module.family.name,
        granularity="tensor" if module.axis is None else "channel",
        module=meta.module_path(node) or name.rpartition(".")[0],
        made_by="insert_quantizers",
    )
    meta.set_quantized_tensor(node, tensor)
    return node


def _stored_grid(lowering: Lowering, target: str, module: Quantizer) -> StoredGrid:
    if target not in lowering.grids:
        grid = module.grid()
        grid = replace(grid, scale=grid.scale.cpu())
        stem = _path(target)
        scale = set_attribute(lowering.built.module, f"{stem}.scale", grid.scale)
        zero = torch.tensor(grid.zero_point, dtype=torch.uint8)
        zero_point = set_attribute(lowering.built.module, f"{stem}.zero_point", zero)
        lowering.grids[target] = StoredGrid(grid, scale, zero_point)
    return lowering.grids[target]


def _unfused_softmax(lowering: Lowering, node: fx.Node) -> fx.Node:
    """The float tensor of a node; a softmax is kept from the runtime's integer kernel.

    ONNX Runtime 1.31's QLinearSoftmax is slower than the float operator between DequantizeLinear and
    QuantizeLinear, and does not saturate: a probability above the largest code becomes 0. A minimum
    with 1 changes nothing and stands between.
    """
    value = lowering.float_of(node)
    op = op_of(node, lowering.modules)
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    on_grid = isinstance(lowering.values.get(source) if source else None, Codes)
    if op is None or not op.reads_scores or not on_grid:
        return value
    one = lowering.built.buffer("one", torch.tensor(1.0))
    return lowering.graph.call_function(torch.minimum, (value, one))


def _path(quantizer: str) -> str:
    """The path of the quantized tensor."""
    return re.sub(r"[._]output_quantizer$", "", quantizer)
