"""A float model with the grids of its encodings file in it, as a simulator of QNN computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


def applied(model: onnx.ModelProto, encodings: dict[str, Any]) -> onnx.ModelProto:
    """Each tensor that has an encoding behind QuantizeLinear and DequantizeLinear, by the definition of the form."""
    graph = model.graph
    made = []
    for one in encodings["activation_encodings"] + encodings["param_encodings"]:
        name, bits = one["name"], one["bw"]
        stored = next((x for x in graph.initializer if x.name == name), None)
        scale = np.array(one["scale"], np.float32)
        offset = np.array(one["offset"])
        if stored is not None:
            real = numpy_helper.to_array(stored)
            axes = [i for i, size in enumerate(real.shape) if size == scale.size]
            axis = axes[-1] if name in last_axis(graph) else axes[0] if axes else 0
            shape = [-1 if i == axis else 1 for i in range(real.ndim)] if scale.size > 1 else []
            step, shift = scale.reshape(shape), offset.reshape(shape)
            codes = np.clip(np.rint(real / step) - shift, 0, 2**bits - 1)
            stored.CopyFrom(numpy_helper.from_array(((codes + shift) * step).astype("f"), name))
            continue
        assert bits == 8
        names = [f"{name}/{part}" for part in ("scale", "zero", "codes")]
        graph.initializer.append(numpy_helper.from_array(scale[0], names[0]))
        graph.initializer.append(numpy_helper.from_array(np.uint8(-offset[0]), names[1]))
        given = name in {x.name for x in graph.input}
        raw, floats = (name, f"{name}/floats") if given else (f"{name}/raw", name)
        for node in graph.node:
            place = node.input if given else node.output
            renamed = [(floats if given else raw) if x == name else x for x in place]
            del place[:]
            place.extend(renamed)
        made.append(helper.make_node("QuantizeLinear", [raw, *names[:2]], [names[2]]))
        made.append(helper.make_node("DequantizeLinear", [names[2], *names[:2]], [floats]))
    known = {x.name for x in graph.initializer} | {x.name for x in graph.input}
    waiting = [*graph.node, *made]
    del graph.node[:]
    while waiting:
        ready = next(n for n in waiting if all(not x or x in known for x in n.input))
        waiting.remove(ready)
        known |= set(ready.output)
        graph.node.append(ready)
    return model


def last_axis(graph: onnx.GraphProto) -> set[str]:
    """Weights whose output channels are the last axis."""
    return {node.input[1] for node in graph.node if node.op_type == "MatMul"}
