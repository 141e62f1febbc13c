"""Which integer kernels of the installed ONNX Runtime overflow on this processor, with codes that are all the largest.

    python benchmarks/pair_sums.py

Each kernel multiplies activations of 255 (or 127) by weights of the largest code that is tried, 64 and 127 (or 64 and
255), in a session with default options and in one with exact products (`session.x64quantprecision`). A cell says
whether the sums are those of integers of any width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sqakd_fx.runtime.session import EXACT_PRODUCTS

TYPES = {"UINT8": np.uint8, "INT8": np.int8}
LARGEST = {"UINT8": 255, "INT8": 127}
CONVOLUTIONS = {
    "convolution": (16, 16, 3, 1),
    "grouped": (16, 16, 3, 4),
    "depthwise": (16, 16, 3, 16),
    "channel multiplier": (8, 16, 3, 8),
}
"""Channels in and out, kernel, groups."""
Case = tuple[ModelProto, np.ndarray, np.ndarray]


def model(
    operator: str, order: str, x: np.ndarray, constants: dict[str, Any], out: int, **attributes: Any
) -> ModelProto:
    """One operator that reads "x" and stored constants, in `order` ("-" for an absent input)."""
    domain = "com.microsoft" if operator in ("QGemm", "MatMulIntegerToFloat") else ""
    names = ["" if name == "-" else name for name in order.split()]
    node = helper.make_node(operator, names, ["y"], domain=domain, **attributes)
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    ends = [
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", out, None)],
    ]
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph([node], "g", *ends, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def cases(activation: str, weight: str, code: int) -> Iterator[tuple[str, Case]]:
    """Name, model, input and the integers that it should give (scaled so that the largest is 100)."""
    a, w = TYPES[activation], TYPES[weight]
    kind = TensorProto.UINT8 if activation == "UINT8" else TensorProto.INT8
    x, b = np.full((4, 64), LARGEST[activation], a), np.full((64, 16), code, w)
    total = 64 * LARGEST[activation] * code
    common = {"w": b, "xz": a(0), "s": np.float32(1), "sy": np.float32(total / 100)}
    common |= {"wz": w(0), "wzs": np.zeros(16, w), "ws": np.ones(16, np.float32)}
    hundred = np.full((4, 16), 100, a)
    yield "MatMulInteger", (
        model("MatMulInteger", "x w xz wz", x, common, TensorProto.INT32), x,
        np.full((4, 16), total, np.int32),
    )  # fmt: skip
    yield "MatMulIntegerToFloat", (
        model("MatMulIntegerToFloat", "x w s ws xz wzs", x, common, TensorProto.FLOAT), x,
        np.full((4, 16), total, np.float32),
    )  # fmt: skip
    yield "QLinearMatMul", (
        model("QLinearMatMul", "x s xz w s wz sy xz", x, common, kind), x, hundred
    )  # fmt: skip
    yield "QGemm", (
        model("QGemm", "x s xz w ws wzs - sy xz", x, common | {"w": b.T.copy()}, kind, transB=1), x, hundred
    )  # fmt: skip
    for name, (ins, outs, kernel, groups) in CONVOLUTIONS.items():
        image = np.full((1, ins, 6, 6), LARGEST[activation], a)
        weights = np.full((outs, ins // groups, kernel, kernel), code, w)
        sums = weights[0].size * LARGEST[activation] * code
        own = common | {"w": weights, "sy": np.float32(sums / 100), "wz": np.zeros(outs, w)}
        size = 7 - kernel
        yield f"QLinearConv, {name}", (
            model("QLinearConv", "x s xz w ws wz sy xz", image, own, kind, group=groups), image,
            np.full((1, outs, size, size), 100, a),
        )  # fmt: skip


def answer(case: Case, exact_products: bool) -> str:
    made, x, wanted = case
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if exact_products:
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    try:
        running = ort.InferenceSession(made.SerializeToString(), options, ["CPUExecutionProvider"])
        (got,) = running.run(None, {"x": x})
    except Exception:
        return "no kernel"
    return "exact" if np.array_equal(got, wanted) else "overflows"


def main() -> None:
    print(f"ONNX Runtime {ort.__version__}\n")
    print("| activation | weight | code | kernel | default options | exact products |")
    print("|---|---|---|---|---|---|")
    for activation in TYPES:
        for weight in TYPES:
            for code in (64, LARGEST[weight]):
                for name, case in cases(activation, weight, code):
                    cells = [answer(case, exact_products) for exact_products in (False, True)]
                    print(f"| {activation} | {weight} | {code} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
