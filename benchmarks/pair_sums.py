"""Which integer kernels of the installed ONNX Runtime overflow on this processor, and which weights they pair.

    python benchmarks/pair_sums.py
    qemu-x86_64 -cpu Haswell PYTHON benchmarks/pair_sums.py     # as a processor without VNNI

The first table has codes that are all the largest. Each kernel multiplies activations of 255 (or 127) by weights of the
largest code that is tried, 64 and 127 (or 64 and 255), in a session with default options and in one with exact products
(`session.x64quantprecision`). A cell says whether the sums are those of integers of any width.

The second table has two weights of 127 in each output channel, at every two places of it, beside activations of 255.
It says which two a kernel adds in 16 bits. Its last column is OpenVINO with default options, where it is installed.
"""

from __future__ import annotations

import importlib.util
import itertools
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


PAIRED = {
    "QLinearMatMul": (9,),
    "QGemm": (9,),
    "QLinearConv, 1 x 1": (9, 1, 1),
    "QLinearConv, even channels": (4, 3, 3),
    "QLinearConv, odd channels": (3, 3, 3),
    "QLinearConv, one axis": (4, 5),
    "QLinearConv, many channels": (32, 1, 1),
}
"""Shape of one output channel's weights: input channels and the places of the kernel."""


def added_pairs(name: str, shape: tuple[int, ...]) -> set[tuple[int, int]]:
    """Places in one output channel whose products a kernel adds in 16 bits."""
    places = list(itertools.combinations(range(int(np.prod(shape))), 2))
    weights = np.zeros((len(places), int(np.prod(shape))), np.int8)
    for row, pair in zip(weights, places, strict=True):
        row[list(pair)] = 127
    exact = np.float32(2 * 255 * 127 / 200)
    constants = {"xz": np.uint8(0), "s": np.float32(1), "sy": exact}
    constants |= {"wz": np.zeros(len(places), np.int8), "ws": np.ones(len(places), np.float32)}
    x = np.full((1, *shape), 255, np.uint8)
    if name == "QLinearMatMul":
        own = constants | {"w": weights.T.copy(), "wz": np.int8(0)}
        made = model(name, "x s xz w s wz sy xz", x, own, TensorProto.UINT8)
    elif name == "QGemm":
        own = constants | {"w": weights}
        made = model(name, "x s xz w ws wz - sy xz", x, own, TensorProto.UINT8, transB=1)
    else:
        own = constants | {"w": weights.reshape(-1, *shape)}
        made = model("QLinearConv", "x s xz w ws wz sy xz", x, own, TensorProto.UINT8)
    running = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = running.run(None, {"x": x})
    return {pair for pair, code in zip(places, got.reshape(-1), strict=True) if code != 200}


def added_by_openvino(name: str, shape: tuple[int, ...]) -> set[tuple[int, int]]:
    """`added_pairs` of the OpenVINO kernel for the same layer between QuantizeLinear and DequantizeLinear."""
    import openvino

    places = list(itertools.combinations(range(int(np.prod(shape))), 2))
    weights = np.zeros((len(places), int(np.prod(shape))), np.int8)
    for row, pair in zip(weights, places, strict=True):
        row[list(pair)] = 127
    is_product = name in ("QLinearMatMul", "QGemm")
    w = weights.T.copy() if is_product else weights.reshape(-1, *shape)
    stored = {"w": w, "z": np.uint8(0), "wz": np.zeros(len(places), np.int8)}
    stored |= {"s": np.float32(1), "ws": np.ones(len(places), np.float32)}
    stored |= {"sy": np.float32(2 * 255 * 127 / 200)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=int(is_product)),
        helper.make_node("MatMul" if is_product else "Conv", ["xd", "wd"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "sy", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "sy", "z"], ["y"]),
    ]
    ends = [
        [helper.make_tensor_value_info(end, TensorProto.FLOAT, dims)]
        for end, dims in (("x", (1, *shape)), ("y", None))
    ]
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()]
    made = helper.make_model(
        helper.make_graph(nodes, "g", *ends, constants),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    running = openvino.Core().compile_model(
        openvino.Core().read_model(made.SerializeToString()), "CPU"
    )
    got = running(np.full((1, *shape), 255, np.float32))[0] / stored["sy"]
    return {pair for pair, code in zip(places, got.reshape(-1), strict=True) if round(code) != 200}


def told_pairs(shape: tuple[int, ...], found: set[tuple[int, int]]) -> str:
    channels, kernel = shape[0], int(np.prod(shape[1:]))
    side_by_side = {
        (2 * k * kernel + place, (2 * k + 1) * kernel + place)
        for k in range(channels // 2)
        for place in range(kernel)
    }
    if not found:
        return "none"
    if found == side_by_side:
        return "channels 2k and 2k + 1 at one place"
    return f"{len(found)} pairs, others among them"


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
    has_openvino = importlib.util.find_spec("openvino") is not None
    print("\n| kernel | weights of a channel | added in 16 bits | by OpenVINO |")
    print("|---|---|---|---|")
    for name, shape in PAIRED.items():
        sizes = " x ".join(map(str, shape))
        other = told_pairs(shape, added_by_openvino(name, shape)) if has_openvino else "–"
        print(f"| {name} | {sizes} | {told_pairs(shape, added_pairs(name, shape))} | {other} |")


if __name__ == "__main__":
    main()
