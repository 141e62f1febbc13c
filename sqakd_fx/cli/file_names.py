"""What the names of an exported file belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from sqakd_fx.errors import StorageError, short


def layers_of_names(model: Path) -> Mapping[str, str]:
    """Every name of a node, tensor or constant to the layer or operation that its node is named after.

    A tensor belongs to what makes it, a constant to what reads it, and what only computes shapes to what reads those.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception as error:
        raise StorageError(
            f"{model} cannot be read ({short(error)}): run `sqakd-fx export` on its folder"
        ) from error
    readers: dict[str, Any] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, node)
    found: dict[str, str] = {}
    for node in reversed(graph.node):  # readers before what they read
        named = "/" in node.name
        layer = node.name.partition("/")[0] if named else _of_reader(node, readers, found)
        found |= dict.fromkeys((node.name, *node.output), layer)
    for constant in graph.initializer:
        if constant.name in readers:
            found[constant.name] = found[readers[constant.name].output[0]]
    return {name: layer for name, layer in found.items() if name and layer}


def _of_reader(node: Any, readers: Mapping[str, Any], found: Mapping[str, str]) -> str:
    known = (found[readers[name].output[0]] for name in node.output if name in readers)
    return next(known, "")
