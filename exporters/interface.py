"""What a deployer meets of an ONNX file: names and sizes of inputs and outputs, and what each is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from sqakd_fx.exporters.names import names_of, values_of
from sqakd_fx.ir.tensor_names import free_name, numbered_outputs
from sqakd_fx.recipe.free_axes import FreeAxes, of_each
from sqakd_fx.recipe.keys import BATCH


@dataclass(frozen=True)
class Interface:
    """The name of the model's class, and what each of its inputs and outputs is, in words."""

    model: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


UNDESCRIBED = Interface()


def name_interface(model: ir.Model, names: Sequence[str], free_axes: FreeAxes = ()) -> None:
    """Outputs are called `names`, or by numbers where those are not as many; the first axis of an input is the batch.

    `free_axes` has the names of an input's other axes.

    An input that is given back, and an output that is given twice, have a value of their own.
    """
    _part_outputs(model)
    _name_axes(model, free_axes)
    outputs = model.graph.outputs
    taken = {str(v.name) for v in (*model.graph.inputs, *model.graph.initializers.values())}
    wanted: list[str] = []
    for name in names if len(names) == len(outputs) else numbered_outputs(len(outputs)):
        wanted.append(free_name(name, taken))
        taken.add(wanted[-1])
    made = set(outputs)
    others = [v for v in values_of(model) if v.name in wanted and v not in made]
    taken = names_of(model) | set(wanted)
    for value in others:
        value.name = free_name(str(value.name), taken)
        taken.add(value.name)
    for value, name in zip(outputs, wanted, strict=True):
        value.name = name


def _part_outputs(model: ir.Model) -> None:
    seen = {*model.graph.inputs, *model.graph.initializers.values()}
    for index, value in enumerate(model.graph.outputs):
        if value in seen:
            node = ir.node("Identity", [value])
            model.graph.append(node)
            own = node.outputs[0]
            own.type, own.shape = value.type, None if value.shape is None else value.shape.copy()
            model.graph.outputs[index] = own
        seen.add(value)


def _name_axes(model: ir.Model, free_axes: FreeAxes) -> None:
    """Symbols of torch's exporter get names; an axis that is computed of them is called as it is computed."""
    names: dict[str, str] = {}
    inputs = model.graph.inputs
    for value, free in zip(inputs, of_each(free_axes, len(inputs)), strict=True):
        for axis, size in enumerate(value.shape or ()):
            called = {0: BATCH, **free}.get(axis)
            if called is not None and isinstance(size, ir.SymbolicDim) and size.value is not None:
                names.setdefault(size.value, called)
    numbers = (f"axis_{number}" for number in range(1, 1 << 16))
    for value in (*model.graph.inputs, *model.graph.outputs):
        for symbol in _symbols(value):
            for word in re.findall(r"\b[A-Za-z_]\w*\b(?!\()", symbol):
                if word not in names:
                    names[word] = next(numbers)
        if value.shape is not None:
            for index, size in enumerate(value.shape):
                if isinstance(size, ir.SymbolicDim) and size.value is not None:
                    called = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)
                    value.shape[index] = ir.SymbolicDim(called)


def _symbols(value: ir.Value) -> list[str]:
    sizes = value.shape or ()
    return [str(x.value) for x in sizes if isinstance(x, ir.SymbolicDim) and x.value is not None]


def describe_interface(model: ir.Model, interface: Interface) -> None:
    """Write what the model, its inputs and its outputs are into the file."""
    model.graph.doc_string = interface.model or None
    for values, said in (
        (model.graph.inputs, interface.inputs),
        (model.graph.outputs, interface.outputs),
    ):
        if len(values) == len(said):
            for value, text in zip(values, said, strict=True):
                value.doc_string = text
