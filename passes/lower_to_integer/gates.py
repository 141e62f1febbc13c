"""A hard-swish of codes: the gate is a sum of codes, and gates them in a product."""

from __future__ import annotations

import torch
from torch import fx

from sqakd_fx.ir import meta
from sqakd_fx.ir.quantized_tensors import QuantizedTensor
from sqakd_fx.ir.rewriting import node_path
from sqakd_fx.passes.lower_to_integer.state import Lowering
from sqakd_fx.passes.lower_to_integer.values import Arithmetic, Codes, StoredGrid
from sqakd_fx.quant.gated import GATE, SHIFTED, THREE
from sqakd_fx.quant.grid import Grid

_OPS = torch.ops.sqakd_fx


def gated(lowering: Lowering, node: fx.Node, x: Codes) -> Arithmetic:
    """The product of codes and their gate, waiting for its grid."""
    built = lowering.built
    largest = built.buffer("hard_swish.three", torch.tensor(THREE.qmax, dtype=torch.uint8))
    three = Codes(largest, _stored(lowering, "three", THREE))
    shifted = _stored(lowering, "shifted", SHIFTED)
    code = lowering.graph.call_function(
        _OPS.add.default,
        (
            *built.grid_arguments((x, three)),
            *built.grid_parameters(shifted),
            SHIFTED.qmin,
            SHIFTED.qmax,
        ),
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
    meta.set_quantized_tensor(code, tensor)
    gate = Codes(code, _stored(lowering, "gate", GATE))
    return Arithmetic(node, _OPS.mul.default, (x, gate), ())


def _stored(lowering: Lowering, name: str, grid: Grid) -> StoredGrid:
    """A grid that all hard-swishes have in common."""
    path = f"hard_swish.{name}"
    if path not in lowering.grids:
        scale = lowering.built.buffer(f"{path}_scale", grid.scale)
        zero = lowering.built.buffer(f"{path}_zero_point", torch.tensor(0, dtype=torch.uint8))
        lowering.grids[path] = StoredGrid(grid, str(scale.target), str(zero.target))
    return lowering.grids[path]
