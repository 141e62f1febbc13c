"""Nonlinear functions between quantized tensors on ONNX Runtime: which form is the fastest, as a table.

    python benchmarks/activations.py [GLOB ...] [--seconds S] [--threads N]

    float    DequantizeLinear, the float operator, QuantizeLinear
    kernel   the runtime's own integer kernel, where the same model has one ("–" where not)
    lookup   Gather from the 256 codes of the result, for functions of one code ("–" for others)

The forms of a row take turns, and medians are shown. `÷ float` below 1 is faster than float. The last column
is what exported models hold. A gate and a product of codes, behind a convolution, are measured by `layer_forms.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from capabilities import processor
from chosen import chosen
from onnx import reference

SCALES = (np.float32(0.05), np.float32(1 / 64))
ZEROS = (np.uint8(128), np.uint8(64))
FUSION = "QDQSelectorActionTransformer"
FORMS = ("float", "kernel", "lookup")
GATE_OF_CODES = "a gate and a product of codes"


@dataclass(frozen=True)
class Activation:
    """An operator, or two: `steps` makes its output from its input."""

    shape: tuple[int, ...]
    steps: Callable[[Builder, ir.Value], ir.Value]
    of_one_code: bool = True
    exported: str = "float"


class Builder:
    """Collects the nodes and stored tensors of a model from one float input to one float output."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.nodes: list[ir.Node] = []
        self.stored: list[ir.Value] = []
        kind = ir.TensorType(ir.DataType.UINT8)
        self.given = ir.val("x", shape=ir.Shape(shape), type=kind)

    def then(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes=attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: Any) -> ir.Value:
        tensor = ir.tensor(np.asarray(array), name=f"c{len(self.stored)}")
        made = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.stored.append(made)
        return made

    def model(self, y: ir.Value) -> ir.Model:
        y.name, y.type = "y", ir.TensorType(ir.DataType.UINT8)
        graph = ir.Graph(
            [self.given],
            [y],
            nodes=self.nodes,
            initializers=self.stored,
            opset_imports={"": 21},
            name="activation",
        )
        return ir.Model(graph, ir_version=10)


def operator(name: str, **attributes: Any) -> Callable[[Builder, ir.Value], ir.Value]:
    return lambda b, x: b.then(name, x, **attributes)


def silu(b: Builder, x: ir.Value) -> ir.Value:
    return b.then("Mul", x, b.then("Sigmoid", x))


def scaled_softmax(b: Builder, x: ir.Value) -> ir.Value:
    """As in attention; the Mul keeps the runtime from its integer kernel."""
    return b.then("Softmax", b.then("Mul", x, b.constant(np.float32(0.125))))


def bounded_softmax(b: Builder, x: ir.Value) -> ir.Value:
    """A minimum with 1 changes nothing and keeps the runtime from its integer kernel."""
    return b.then("Min", b.then("Softmax", x), b.constant(np.float32(1)))


def layer_norm(b: Builder, x: ir.Value) -> ir.Value:
    size = int(b.given.shape[-1])  # type: ignore[index,arg-type]
    ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)
    return b.then("LayerNormalization", x, b.constant(ones), b.constant(zeros), axis=-1)


ACTIVATIONS: Mapping[str, Activation] = {
    "sigmoid, 8×32×28×28": Activation((8, 32, 28, 28), operator("Sigmoid"), exported="kernel"),
    "softmax, 3×197×197": Activation(
        (1, 3, 197, 197), operator("Softmax"), False, "float, bounded"
    ),
    "softmax, 8×32×32": Activation((1, 8, 32, 32), operator("Softmax"), False, "float, bounded"),
    "softmax, 8×1000": Activation((8, 1000), operator("Softmax"), False, "float, bounded"),
    "scaled softmax, 3×197×197": Activation((1, 3, 197, 197), scaled_softmax, False),
    "bounded softmax, 3×197×197": Activation((1, 3, 197, 197), bounded_softmax, False),
    "bounded softmax, 8×1000": Activation((8, 1000), bounded_softmax, False),
    "leaky ReLU, 8×32×28×28": Activation((8, 32, 28, 28), operator("LeakyRelu"), exported="kernel"),
    "tanh, 8×32×28×28": Activation((8, 32, 28, 28), operator("Tanh")),
    "hard sigmoid, 1×96×1×1": Activation((1, 96, 1, 1), operator("HardSigmoid")),
    "hard swish, 8×32×28×28": Activation(
        (8, 32, 28, 28), operator("HardSwish"), exported=GATE_OF_CODES
    ),
    "SiLU, 8×32×28×28": Activation((8, 32, 28, 28), silu, exported=GATE_OF_CODES),
    "GELU, 197×768": Activation((1, 197, 768), operator("Gelu")),
    "LayerNorm, 197×192": Activation((1, 197, 192), layer_norm, False),
}


def float_model(activation: Activation) -> ir.Model:
    """uint8 codes → DequantizeLinear → the function → QuantizeLinear → uint8 codes."""
    b = Builder(activation.shape)
    real = b.then("DequantizeLinear", b.given, b.constant(SCALES[0]), b.constant(ZEROS[0]))
    y = activation.steps(b, real)
    return b.model(b.then("QuantizeLinear", y, b.constant(SCALES[1]), b.constant(ZEROS[1])))


def lookup_model(activation: Activation) -> ir.Model:
    """uint8 codes → Cast → Gather(table of 256 codes) → uint8 codes."""
    narrow = Activation((256,), activation.steps)
    made = reference.ReferenceEvaluator(ir.to_proto(float_model(narrow)))
    (table,) = made.run(None, {"x": np.arange(256, dtype=np.uint8)})
    b = Builder(activation.shape)
    index = b.then("Cast", b.given, to=int(ir.DataType.INT32))
    return b.model(b.then("Gather", b.constant(table), index, axis=0))


def sessions(activation: Activation, threads: int) -> dict[str, ort.InferenceSession]:
    """The forms that there are, by name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        whole, optimized = Path(folder) / "float.onnx", Path(folder) / "optimized.onnx"
        ir.save(float_model(activation), whole)
        options = _options(threads)
        found["float"] = ort.InferenceSession(str(whole), options, disabled_optimizers=[FUSION])
        options = _options(threads)
        options.optimized_model_filepath = str(optimized)
        kernel = ort.InferenceSession(str(whole), options, ["CPUExecutionProvider"])
        operators = [node.op_type for node in ir.load(optimized).graph]
        if "DequantizeLinear" not in operators:
            found["kernel"] = kernel
        if activation.of_one_code:
            path = Path(folder) / "lookup.onnx"
            ir.save(lookup_model(activation), path)
            found["lookup"] = ort.InferenceSession(str(path), _options(threads))
    return found


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def measured(
    forms: Mapping[str, ort.InferenceSession], codes: np.ndarray, seconds: float
) -> tuple[dict[str, float], dict[str, int]]:
    """Median milliseconds of each form, and the most codes' steps that it is away from float."""
    outputs = {name: running.run(None, {"x": codes})[0] for name, running in forms.items()}
    wanted = outputs["float"].astype(np.int32)
    steps = {name: int(np.abs(y.astype(np.int32) - wanted).max()) for name, y in outputs.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["float"]) < 5:
        for name, running in forms.items():
            started = time.perf_counter()
            running.run(None, {"x": codes})
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in times.items()}, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("globs", nargs="*", default=["*"])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(f"ONNX Runtime {ort.__version__}, {processor()}, threads: {options.threads}\n")
    print(
        "| function | float (ms) | kernel (ms) | ÷ float | steps | lookup (ms) | ÷ float | steps | fastest | exported |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in chosen(ACTIVATIONS, options.globs):
        activation = ACTIVATIONS[name]
        codes = np.random.default_rng(0).integers(0, 256, activation.shape, dtype=np.uint8)
        forms = sessions(activation, options.threads)
        found, steps = measured(forms, codes, options.seconds)
        cells = [f"{found['float']:.3f}"]
        for form in FORMS[1:]:
            known = form in found
            cells.append(f"{found[form]:.3f}" if known else "–")
            cells.append(f"{found[form] / found['float']:.2f}" if known else "–")
            cells.append(str(steps[form]) if known else "–")
        fastest = min(found, key=lambda form: found[form])
        print(f"| {name} | {' | '.join(cells)} | {fastest} | {activation.exported} |", flush=True)


if __name__ == "__main__":
    main()
