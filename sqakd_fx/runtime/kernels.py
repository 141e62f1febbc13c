"""The graph that ONNX Runtime runs in place of a file's: its kernels, and what of the file each stands for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from sqakd_fx.runtime.fusion import INTEGER
from sqakd_fx.runtime.session import session

KernelKind = Literal["integer", "float", "conversion", "moves"]
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
_MOVES = (
    "Cast",
    "Concat",
    "Constant",
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Pad",
    "ReorderInput",
    "ReorderOutput",
    "Reshape",
    "Resize",
    "Shape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
_CLIPS = ("Relu", "Clip", "LeakyRelu")


@dataclass(frozen=True)
class Kernel:
    """One node of the optimized graph.

    Attributes:
        layer: the layer or operation of the student that it computes; empty where its name does not say.
        inputs: positions of the kernels whose tensors it reads.
        made_of: operators of the file that it stands for, as far as their names are kept.
        grid: the quantizer whose grid its output has; empty where that is not known.
    """

    name: str
    operator: str
    kind: KernelKind
    layer: str
    inputs: tuple[int, ...]
    made_of: tuple[str, ...]
    grid: str


def kernels_of(model: Path, folder: Path) -> tuple[Kernel, ...]:
    """The kernels of a file in the installed ONNX Runtime, in order; what computes shapes is left out.

    Raises:
        ParityError: the runtime refuses the file.
    """
    target = folder / "optimized.onnx"
    session(model, optimized_to=target)
    optimized = onnx.load(str(target), load_external_data=False).graph
    original = _Original(onnx.load(str(model), load_external_data=False).graph)
    told = (*optimized.value_info, *optimized.output)
    types = {value.name: value.type.tensor_type.elem_type for value in told}
    constants = {one.name for one in optimized.initializer}
    makers: dict[str, int] = {}
    of_shapes: set[str] = set()
    codes: set[str] = set()
    found: list[Kernel] = []
    for node in optimized.node:
        read = [name for name in node.input if name and name not in constants]
        if node.op_type == "Shape" or (read and all(name in of_shapes for name in read)):
            of_shapes.update(node.output)
            continue
        makers |= dict.fromkeys(node.output, len(found))
        inputs = tuple(dict.fromkeys(makers[name] for name in read if name in makers))
        kind = _kind(node, types, on_codes=any(name in codes for name in read))
        if kind == "integer" or node.op_type == "QuantizeLinear" or codes.intersection(read):
            codes.update(node.output if node.op_type != "DequantizeLinear" else ())
        found.append(_kernel(node, kind, inputs, original))
    return tuple(found)


def _kernel(node: Any, kind: KernelKind, inputs: tuple[int, ...], original: _Original) -> Kernel:
    name = re.sub(r"_token_\d+$", "", node.name)
    parts, grid = original.around(name)
    return Kernel(
        name or node.output[0],
        node.op_type,
        kind,
        name.partition("/")[0] if "/" in name else "",
        inputs,
        parts if len(parts) > 1 else (),
        grid,
    )


def _kind(node: Any, types: Mapping[str, int], *, on_codes: bool) -> KernelKind:
    """What a node of the optimized graph computes on; `on_codes` where it reads codes."""
    if node.op_type.startswith(INTEGER):
        return "integer"
    if node.op_type in _CONVERSIONS:
        return "conversion"
    is_float = types.get(node.output[0], onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
    return "float" if is_float and not on_codes and node.op_type not in _MOVES else "moves"


class _Original:
    """The file's own graph, asked what stands around a node."""

    def __init__(self, graph: Any) -> None:
        self.nodes = {node.name: node for node in graph.node if node.name}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def around(self, name: str) -> tuple[tuple[str, ...], str]:
        """The operators that a kernel of this name stands for, and the quantizer that its output is put on."""
        node = self.nodes.get(name)
        if node is None:
            return (), ""
        before = [self.makers[one] for one in node.input if one in self.makers]
        parts = [one.op_type for one in before if one.op_type == "DequantizeLinear"]
        parts.append(node.op_type)
        last = node
        while len(readers := self.readers.get(last.output[0], [])) == 1:
            (reader,) = readers
            if reader.op_type not in (*_CLIPS, "QuantizeLinear"):
                break
            parts.append(reader.op_type)
            last = reader
            if reader.op_type == "QuantizeLinear":
                break
        if last.op_type != "QuantizeLinear":
            return (tuple(_counted(parts)) if last is not node else ()), ""
        return tuple(_counted(parts)), last.input[1].removesuffix(".scale")


def _counted(operators: list[str]) -> list[str]:
    """Each operator once, with how often it is there."""
    return [f"{count} {name}" if count > 1 else name for name, count in Counter(operators).items()]
