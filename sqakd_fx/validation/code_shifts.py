"""Codes of a file whose zero point is another than the program's: UINT8 code q about z is code q - z, INT8 or float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from torch import fx

from sqakd_fx.ir.quantized_tensors import is_own_operation
from sqakd_fx.ir.rewriting import get_attribute
from sqakd_fx.validation.file_constants import Array

_AROUND_ZERO: Mapping[int, type[np.generic]] = {
    TensorProto.INT8: np.int8,
    TensorProto.FLOAT: np.float32,
}


@dataclass(frozen=True)
class Shift:
    """The program's zero point of a tensor, and the type of the file's codes, which are about 0."""

    zero_point: int
    kind: type[np.generic]


def code_shifts(
    lowered: fx.GraphModule, names: Mapping[str, str], model: Path
) -> Mapping[str, Shift]:
    """The shift of each tensor that the file holds about zero point 0; `names` are by lowered node."""
    graph = onnx.load(str(model), load_external_data=False).graph
    kinds = {v.name: _AROUND_ZERO.get(v.type.tensor_type.elem_type) for v in graph.value_info}
    return {
        names[node.name]: Shift(_zero_point(lowered, node), kind)
        for node in lowered.graph.nodes
        if node.name in names and (kind := kinds.get(names[node.name])) is not None
    }


def _zero_point(lowered: fx.GraphModule, node: fx.Node) -> int:
    assert is_own_operation(node)
    arguments = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    stored: Any = node.args[arguments.index("zero_point")]
    return int(get_attribute(lowered, str(stored.target)))


def as_stored(codes: Array, shift: Shift | None) -> Array:
    """Codes of the program as the file has them."""
    if shift is None:
        return codes
    return (codes.astype(np.int16) - shift.zero_point).astype(shift.kind)


def as_trained(codes: Array, shift: Shift | None) -> Array:
    """Codes of the file as the program has them."""
    return codes if shift is None else codes.astype(np.int16) + shift.zero_point
