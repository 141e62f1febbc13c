"""A hard-swish or a SiLU of codes: a gate of codes, which gates them in a product."""

from __future__ import annotations

import torch
from torch import fx

from sqakd_fx.ir import meta
from sqakd_fx.ir.quantized_tensors import QuantizedTensor
from sqakd_fx.ir.rewriting import node_path
from sqakd_fx.passes.lower_to_integer.state import Lowering
from sqakd_fx.passes.lower_to_integer.values import Arithmetic, Codes, StoredGrid
from sqakd_fx.quant.gated import GATE, SHIFTED, THREE, SiluByCodes
from sqakd_fx.quant.grid import Grid

_OPS = torch.ops.sqakd_fx


def gated(lowering: Lowering, node: fx.Node, x: Codes) -> Arithmetic:
    """The product of codes and their gate, waiting for its grid."""
    module = lowering.modules[str(node.target)]
    gate = (
        _sigmoid(lowering, node, module.gate())
        if isinstance(module, SiluByCodes)
        else _shifted(lowering, x)
    )
    path = f"{node_path(node)}.gate"
    tensor = QuantizedTensor(
        path,
        GATE.bits,
        GATE.qmin,
        GATE.qmax,
        "minmax",
        "tensor",
        meta.module_path(node),
        "lower_to_integer",
    )
    meta.set_quantized_tensor(gate.node, tensor)
    return Arithmetic(node, _OPS.mul.default, (x, gate), ())


def _shifted(lowering: Lowering, x: Codes) -> Codes:
    """The gate of hard-swish: x + 3 saturates at 0 and 6, and is read as from 0 to 1."""
    built = lowering.built
    largest = built.buffer("hard_swish.three", torch.tensor(THREE.qmax, dtype=torch.uint8))
    three = Codes(largest, _stored(lowering, "hard_swish.three", THREE))
    shifted = _stored(lowering, "hard_swish.shifted", SHIFTED)
    inputs = built.grid_arguments((x, three))
    grid = (*built.grid_parameters(shifted), SHIFTED.qmin, SHIFTED.qmax)
    code = lowering.graph.call_function(_OPS.add.default, (*inputs, *grid))
    return Codes(code, _stored(lowering, "hard_swish.gate", GATE))


def _sigmoid(lowering: Lowering, node: fx.Node, grid: Grid) -> Codes:
    """The gate of SiLU: a sigmoid between codes, which ONNX Runtime makes a QLinearSigmoid."""
    stored = _stored(lowering, f"{node_path(node)}.gate", grid)
    x = lowering.float_of(node.all_input_nodes[0])
    gate = lowering.graph.call_function(torch.sigmoid, (x,))
    gate.meta = dict(node.meta)
    code = lowering.graph.call_function(
        _OPS.quantize.default,
        (gate, *lowering.built.grid_parameters(stored), grid.qmin, grid.qmax),
    )
    return Codes(code, stored)


def _stored(lowering: Lowering, path: str, grid: Grid) -> StoredGrid:
    """A grid by its path; the gates of hard-swish have theirs in common."""
    if path not in lowering.grids:
        scale = lowering.built.buffer(f"{path}_scale", grid.scale)
        zero = lowering.built.buffer(f"{path}_zero_point", torch.tensor(0, dtype=torch.uint8))
        lowering.grids[path] = StoredGrid(grid, str(scale.target), str(zero.target))
    return lowering.grids[path]
