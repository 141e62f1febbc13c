"""Files that ONNX Runtime does not run as they are, computed by the definition of their form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper


def with_encodings_applied(model: onnx.ModelProto, encodings: dict[str, Any]) -> onnx.ModelProto:
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


def run(model: onnx.ModelProto, inputs: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0]


def evaluated(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """A QONNX graph by the definitions of Quant and BipolarQuant, other operators by onnx's reference."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):
        op_domain = "qonnx.custom_op.general"

        def _run(self, x, scale, zero, bits, signed=None, narrow=None, rounding_mode=None):  # type: ignore[no-untyped-def]
            assert bits > 1 or not signed, "the qonnx package computes this as bipolar"
            low = -(2 ** (bits - 1)) if signed else 0
            high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
            q = np.round(np.clip(x / scale + zero, low, high))
            return (((q - zero) * scale).astype(np.float32),)

    class BipolarQuant(OpRun):
        op_domain = "qonnx.custom_op.general"

        def _run(self, x, scale):  # type: ignore[no-untyped-def]
            return ((np.where(x >= 0, 1, -1) * scale).astype(np.float32),)

    running = ReferenceEvaluator(model, new_ops=[Quant, BipolarQuant])
    (y,) = running.run(None, {model.graph.input[0].name: x})
    return y  # type: ignore[no-any-return]
