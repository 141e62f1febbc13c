"""Images of bytes as inputs: what the recipe asks for is computed in front of the model.

    Before:  x (FLOAT, N × C × H × W)
    After:   x (UINT8, N × H × W × C) → Transpose → Cast → Div (scale) → Sub (mean) → Div (std)

In this order and in float32, as loaders of images compute it: then the numbers are theirs to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sqakd_fx.exporters.names import names_of
from sqakd_fx.exporters.packed import add_initializer
from sqakd_fx.ir.tensor_names import free_name
from sqakd_fx.recipe.keys import Preprocess
from sqakd_fx.runtime.preprocessing import PREPROCESS_KEY, TO_NCHW, TO_NHWC, as_text

PREFIX = "preprocess/"
"""Of the names of the nodes."""


def add_preprocessing(model: ir.Model, by_input: Mapping[str, Preprocess]) -> None:
    """Let `model` take images of bytes for the inputs that are named, in place."""
    if not by_input:
        return
    for index, value in enumerate(model.graph.inputs):
        how = by_input.get(str(value.name))
        if how is not None:
            model.graph.inputs[index] = _image(model, value, how)
    model.metadata_props[PREPROCESS_KEY] = as_text(by_input)


def _image(model: ir.Model, floats: ir.Value, how: Preprocess) -> ir.Value:
    """The input of bytes from which `floats` is computed."""
    name = str(floats.name)
    floats.name = free_name(f"{name}_floats", names_of(model))
    image = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=floats.shape)
    if how.layout == "nhwc" and floats.shape is not None:
        image.shape = ir.Shape([floats.shape[axis] for axis in TO_NHWC])
    image.doc_string = _described(floats.doc_string, how)
    nodes: list[ir.Node] = []

    def then(kind: str, x: ir.Value, *rest: ir.Value, **attributes: object) -> ir.Value:
        count = len(nodes)
        node = ir.node(kind, [x, *rest], attributes, name=f"{PREFIX}{name}/{count}/{kind}")
        node.outputs[0].name = free_name(f"{name}_{kind.lower()}_{count}", names_of(model))
        nodes.append(node)
        return node.outputs[0]

    def stored(key: str, *values: float) -> ir.Value:
        array = np.array(values, np.float32).reshape(-1, 1, 1)
        return add_initializer(model, f"{name}_{key}", array)

    x = then("Transpose", image, perm=TO_NCHW) if how.layout == "nhwc" else image
    x = then("Cast", x, to=int(ir.DataType.FLOAT))
    x = then("Div", x, stored("scale", how.scale)) if how.scale != 1 else x
    x = then("Sub", x, stored("mean", *how.mean)) if any(how.mean) else x
    x = then("Div", x, stored("std", *how.std)) if set(how.std) != {1.0} else x
    last, x.name = x.producer(), floats.name
    assert last is not None
    x.type, x.shape = floats.type, floats.shape
    uses = list(floats.uses())
    for use in uses:
        use.node.replace_input_with(use.idx, x)
    first = next(iter(model.graph), None)
    if first is None:
        model.graph.extend(nodes)
    else:
        model.graph.insert_before(first, nodes)
    return image


def _described(said: str | None, how: Preprocess) -> str:
    form = "N × H × W × C" if how.layout == "nhwc" else "N × C × H × W"
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (how.mean, how.std))
    own = f"images of bytes from 0 to 255, {form}; the file computes (x / {how.scale:g} - ({mean})) / ({std})"
    return own if not said else f"{own}, for the {said}"
