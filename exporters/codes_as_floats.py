"""Codes that are moved and clipped in a container model, as the floats that they stand for.

    Before:  QuantizeLinear → MaxPool of codes → Pad with the zero point → DequantizeLinear
    After:   the same operators on floats, and what was stored in codes for them in floats

The profiles of runtimes that know no operators on codes (`encodings.py`, `qonnx.py`, `tensorrt.py`) begin with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.packed import add_initializer, replace_initializer

_FIRST, _ANY = (0,), None
CARRIED: dict[str, tuple[int, ...] | None] = {
    "Clip": (0, 1, 2),
    "Concat": _ANY,
    "DepthToSpace": _FIRST,
    "Expand": _FIRST,
    "Flatten": _FIRST,
    "Gather": _FIRST,
    "GatherElements": _FIRST,
    "GatherND": _FIRST,
    "GlobalMaxPool": _FIRST,
    "Identity": _FIRST,
    "Max": _ANY,
    "MaxPool": _FIRST,
    "Min": _ANY,
    "Pad": (0, 2),
    "ReduceMax": _FIRST,
    "ReduceMin": _FIRST,
    "Reshape": _FIRST,
    "Resize": _FIRST,
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Slice": _FIRST,
    "SpaceToDepth": _FIRST,
    "Split": _FIRST,
    "Squeeze": _FIRST,
    "Tile": _FIRST,
    "Transpose": _FIRST,
    "Unsqueeze": _FIRST,
    "Where": (1, 2),
}
"""Operators that hand on codes, or floats where they get floats for codes; the inputs that are codes (None: all)."""


@dataclass(frozen=True)
class Bounded:
    """A QuantizeLinear with the Clip of codes behind it: the last of both nodes, and the codes that it leaves."""

    last: ir.Node
    low: int
    high: int


def bounded(quantize: ir.Node) -> Bounded:
    """What a QuantizeLinear of a container model gives, with its Clip."""
    users = list(quantize.outputs[0].consumers())
    if users and is_bound(users[0]):
        low, high = (int(array_of(bound)) for bound in users[0].inputs[1:3])
        return Bounded(users[0], low, high)
    return Bounded(quantize, 0, 255)


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def is_read_from_codes(value: ir.Value | None) -> bool:
    """Whether a DequantizeLinear makes a value."""
    made = None if value is None else value.producer()
    return made is not None and made.op_type == "DequantizeLinear"


def is_stored(node: ir.Node) -> bool:
    """Whether what a DequantizeLinear reads is a constant."""
    return input_of(node, 0).const_value is not None


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """`new` stands for `old` everywhere; an output of the model keeps its name."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_unused"
        new.name = name
        new.doc_string, new.type, new.shape = old.doc_string, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def array_of(value: ir.Value | None) -> np.ndarray:
    if value is None or value.const_value is None:
        raise ExportError(
            "a scale or a zero point is computed, not stored: this profile cannot hold it"
        )
    return value.const_value.numpy()


def float_bounds(
    model: ir.Model, stem: str, scale: np.ndarray, ends: tuple[int, int]
) -> list[ir.Value]:
    """The floats between which a grid lies whose codes about zero point 0 have these ends."""
    return [
        add_initializer(model, f"{stem}_{end}", np.asarray(code * scale, np.float32))
        for end, code in zip(("lower", "upper"), ends, strict=True)
    ]


def codes_to_floats(model: ir.Model) -> list[ir.Value]:
    """INT8 tensors that no DequantizeLinear reads, of layers in float and of tables, hold their codes as floats."""
    changed = []
    for value in list(model.graph.initializers.values()):
        readers = {use.node.op_type for use in value.uses()}
        if value.dtype != ir.DataType.INT8 or not readers or value.const_value is None:
            continue
        if not readers & {"QuantizeLinear", "DequantizeLinear"}:
            floats = ir.tensor(array_of(value).astype(np.float32), name=value.name)
            replace_initializer(model, value, floats)
            changed.append(value)
    return changed


def forget_types(model: ir.Model) -> None:
    """Types, shapes and notes of what was codes and is floats; whoever needs types infers them."""
    outer = set(model.graph.outputs)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            continue
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outer:
                value.type = value.shape = None


def stored_codes_to_floats(model: ir.Model) -> list[ir.Node]:
    """Constants that codes meet on their way to a DequantizeLinear (bounds, pads, rows): what it makes of them.

    Returns each DequantizeLinear of codes that are computed. What reads the same codes makes the same floats of them.

    Raises:
        ExportError: an operator on that way computes with codes as the numbers that they are.
    """
    done: set[ir.Node] = set()
    readers = [n for n in model.graph if n.op_type == "DequantizeLinear" and not is_stored(n)]
    for node in readers:
        _on_the_way(model, node, done)
    return readers


def _on_the_way(model: ir.Model, node: ir.Node, done: set[ir.Node]) -> None:
    """Of one DequantizeLinear; operators in `done` are left out, and join it."""
    scale, zero_point = array_of(node.inputs[1]), array_of(node.inputs[2]).astype(np.float32)
    waiting = [input_of(node, 0)]
    while waiting:
        made = waiting.pop().producer()
        if made is None or made in done or made.op_type == "QuantizeLinear" or is_bound(made):
            continue
        done.add(made)
        if made.op_type not in CARRIED:
            raise ExportError(
                f"{made.op_type} of codes ({made.name}) has no float form, which this profile needs"
            )
        carried = CARRIED[made.op_type]
        for index, given in enumerate(made.inputs):
            if given is None or (carried is not None and index not in carried):
                continue
            if given.const_value is None:
                waiting.append(given)
            elif given.dtype == ir.DataType.UINT8:
                real = (array_of(given) - zero_point) * scale
                name = f"{made.outputs[0].name}_{index}_float"
                made.replace_input_with(index, add_initializer(model, name, real))


def is_bound(node: ir.Node) -> bool:
    """Whether a node is the Clip of codes that belongs to a QuantizeLinear (`bounded`)."""
    if node.op_type != "Clip":
        return False
    codes = input_of(node, 0)
    made = codes.producer()
    quantizes = made is not None and made.op_type == "QuantizeLinear"
    return quantizes and len(list(codes.consumers())) == 1
