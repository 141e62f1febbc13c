"""How much more time ONNX Runtime takes for an operation in float between codes than on codes.

    python benchmarks/float_work.py [--runs 60]

A multiply-accumulate of a layer costs some of that time, and each element that an operation gives: reading and writing
four bytes in place of one, and the two conversions. The last line is the second over the first, by least squares. The
search for sensitive tensors weighs operations by it. One thread, medians of wall time, the two forms take turns.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

_SCALE, _ZERO_POINT = "scale", "zero_point"
_GRID = (_SCALE, _ZERO_POINT)
_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Case:
    """An operation of codes, the same in float, the shape of its inputs, and what it computes."""

    name: str
    on_codes: ModelProto
    in_float: ModelProto
    inputs: dict[str, tuple[int, ...]]
    macs: int
    elements: int


def convolution(inputs: int, outputs: int, kernel: int, groups: int, size: int) -> Case:
    """A convolution that keeps the size of its input."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-60, 61, (outputs, inputs // groups, kernel, kernel)).astype(np.int8)
    constants = {
        "w": codes,
        "w_scale": np.full(outputs, 0.01, np.float32),
        "w_zero_point": np.zeros(outputs, np.int8),
        "bias": np.zeros(outputs, np.int32),
        "float_w": codes * np.float32(0.01),
        "float_bias": np.zeros(outputs, np.float32),
    }
    attributes = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "group": groups}
    weight = ["w", "w_scale", "w_zero_point", *_GRID, "bias"]
    shapes = {"x": (1, inputs, size, size)}
    return Case(
        f"convolution {inputs}->{outputs}, {kernel}x{kernel}, {groups} groups, {size}x{size}",
        _model(
            [helper.make_node("QLinearConv", ["x", *_GRID, *weight], ["y"], **attributes)],
            shapes,
            constants,
        ),
        _between_codes("Conv", shapes, ["float_w", "float_bias"], constants, attributes),
        shapes,
        outputs * size * size * codes[0].size,
        outputs * size * size,
    )


def elementwise(op: str, shape: tuple[int, ...]) -> Case:
    """A sum or a product of two tensors."""
    shapes = {"x": shape, "other": shape}
    read = [part for name in shapes for part in (name, *_GRID)]
    node = helper.make_node(f"QLinear{op}", [*read, *_GRID], ["y"], domain=_MICROSOFT)
    return Case(
        f"{op} {shape}",
        _model([node], shapes, {}),
        _between_codes(op, shapes, [], {}, {}),
        shapes,
        0,
        math.prod(shape),
    )


def _between_codes(
    op: str,
    shapes: dict[str, tuple[int, ...]],
    more: Sequence[str],
    constants: dict[str, np.ndarray],
    attributes: dict[str, object],
) -> ModelProto:
    nodes = [
        helper.make_node("DequantizeLinear", [name, *_GRID], [f"float_{name}"]) for name in shapes
    ]
    values = [f"float_{name}" for name in shapes]
    nodes.append(helper.make_node(op, [*values, *more], ["float_y"], **attributes))
    nodes.append(helper.make_node("QuantizeLinear", ["float_y", *_GRID], ["y"]))
    return _model(nodes, shapes, constants)


def _model(
    nodes: list[NodeProto],
    shapes: dict[str, tuple[int, ...]],
    constants: dict[str, np.ndarray],
) -> ModelProto:
    grid = {_SCALE: np.array(0.05, np.float32), _ZERO_POINT: np.array(128, np.uint8)}
    inputs = [helper.make_tensor_value_info(n, TensorProto.UINT8, s) for n, s in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    stored = [numpy_helper.from_array(value, name) for name, value in (grid | constants).items()]
    graph = helper.make_graph(nodes, "case", inputs, [output], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def milliseconds(case: Case, runs: int) -> tuple[float, float]:
    """Medians on codes and in float."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Else the runtime computes the float form on codes as well.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    sessions = [
        ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        for model in (case.on_codes, case.in_float)
    ]
    rng = np.random.default_rng(0)
    feed = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in case.inputs.items()}
    taken: list[list[float]] = [[], []]
    for _ in range(runs):
        for one, times in zip(sessions, taken, strict=True):
            begun = time.perf_counter()
            one.run(None, feed)
            times.append(1e3 * (time.perf_counter() - begun))
    on_codes, in_float = (float(np.median(times)) for times in taken)
    return on_codes, in_float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=60)
    runs = parser.parse_args().runs
    cases = [
        convolution(64, 64, 3, 1, 56),
        convolution(128, 128, 3, 1, 28),
        convolution(64, 64, 1, 1, 56),
        convolution(256, 256, 1, 1, 14),
        convolution(32, 192, 1, 1, 56),
        convolution(192, 192, 3, 192, 56),
        convolution(384, 384, 3, 384, 14),
        elementwise("Add", (1, 64, 56, 56)),
        elementwise("Mul", (1, 64, 56, 56)),
        elementwise("Add", (1, 128, 384)),
        elementwise("Mul", (1, 128, 384)),
    ]
    rows, more = [], []
    for case in cases:
        on_codes, in_float = milliseconds(case, runs)
        print(f"{case.name}: {on_codes:.3f} ms on codes, {in_float:.3f} ms in float")
        rows.append((case.macs, case.elements))
        more.append(1e6 * (in_float - on_codes))
    # Relative to what each gives, so that large cases do not decide alone.
    weights = 1 / np.array([elements for _, elements in rows])
    of_mac, of_element = np.linalg.lstsq(
        np.array(rows) * weights[:, None], np.array(more) * weights, rcond=None
    )[0]
    print(
        f"more in float: {1e3 * of_mac:.1f} ns for 1,000 multiply-accumulates, "
        f"{of_element:.2f} ns an element: one element as {of_element / of_mac:.0f}"
    )


if __name__ == "__main__":
    main()
