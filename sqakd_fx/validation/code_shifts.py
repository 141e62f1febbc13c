"""Codes of a file whose zero point is another than the program's: UINT8 code q about z is INT8 code q - z."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from torch import fx

from sqakd_fx.ir.quantized_tensors import is_own_operation
from sqakd_fx.ir.rewriting import get_attribute
from sqakd_fx.validation.file_constants import Array


def code_shifts(
    lowered: fx.GraphModule, names: Mapping[str, str], model: Path
) -> Mapping[str, int]:
    """The program's zero point of each tensor that the file holds in INT8; `names` are by lowered node."""
    graph = onnx.load(str(model), load_external_data=False).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    return {
        names[node.name]: _zero_point(lowered, node)
        for node in lowered.graph.nodes
        if node.name in names and kinds.get(names[node.name]) == TensorProto.INT8
    }


def _zero_point(lowered: fx.GraphModule, node: fx.Node) -> int:
    assert is_own_operation(node)
    arguments = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    stored: Any = node.args[arguments.index("zero_point")]
    return int(get_attribute(lowered, str(stored.target)))


def as_stored(codes: Array, shift: int | None) -> Array:
    """Codes of the program as the file has them."""
    return codes if shift is None else (codes.astype(np.int16) - shift).astype(np.int8)


def as_trained(codes: Array, shift: int | None) -> Array:
    """Codes of the file as the program has them."""
    return codes if shift is None else codes.astype(np.int16) + shift
