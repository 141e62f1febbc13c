"""Sessions of ONNX Runtime: one execution provider, one optimization level, nothing silent."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from sqakd_fx.errors import ParityError, first_line
from sqakd_fx.runtime.packages import require_whole
from sqakd_fx.runtime.preprocessing import given_to, of_metadata

require_whole(ort)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_OPTIONS = {CUDA: {"use_tf32": "0"}}
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
EXACT_PRODUCTS = "session.x64quantprecision"
"""Setting of a session: x86 processors without 8-bit dot products (VNNI) else add two products in 16 bits.

Files of `weight_range = "full"` alone need it: such sums overflow there without it.
"""


def session(
    model: Path | bytes,
    *,
    provider: str = CPU,
    optimize: bool = True,
    threads: int = 0,
    exact_products: bool = False,
    optimized_to: Path | None = None,
    data_folder: Path | None = None,
) -> ort.InferenceSession:
    """An ONNX Runtime session on a provider, with the CPU for what that does not implement.

    Arithmetic is that of default options, but for `exact_products` (`EXACT_PRODUCTS`), which no model needs whose
    pairs of products fit in 16 bits. `data_folder` is where the external data of a model given as bytes lies. On
    CUDA, float32 products are computed in float32: TF32, the runtime's default, keeps 10 bits of each factor.

    Raises:
        ParityError: the runtime refuses the model, or does not get the provider.
    """
    options = session_options(optimize, threads, exact_products)
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    if data_folder is not None:
        options.add_session_config_entry(_DATA_FOLDER, str(data_folder))
    asked = [(name, _OPTIONS.get(name, {})) for name in dict.fromkeys((provider, CPU))]
    # merging small weights of equal codes, it fails where it then makes unsigned codes of each
    left_out = {"ConstantSharing"} if exact_products else set()
    try:
        made = ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            options,
            providers=asked,
            disabled_optimizers=left_out,
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ParityError(f"ONNX Runtime refuses the model: {first}") from error
    if provider not in made.get_providers():
        raise ParityError(
            f"ONNX Runtime cannot start {provider} here: sqakd-fx doctor lists what it finds"
        )
    return made


def session_options(optimize: bool, threads: int, exact_products: bool) -> ort.SessionOptions:
    """Options of a session that says nothing and lets the cores to others while it waits."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    # waiting threads of one session would take the cores from torch and from other sessions
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact_products:
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    return options


def execute(
    running: ort.InferenceSession, outputs: Sequence[str] | None, feeds: Mapping[str, Any]
) -> list[np.ndarray[Any, Any]]:
    """What a session computes, all outputs where `outputs` is None.

    Raises:
        ParityError: an operator refuses its inputs.
    """
    try:
        made: list[np.ndarray[Any, Any]] = running.run(
            None if outputs is None else list(outputs), feeds
        )
    except Exception as error:
        said = first_line(error).partition("Name:")[2] or first_line(error)
        raise ParityError(
            f"ONNX Runtime loads the model and fails when it runs ({said}): keep that node in float with an "
            "override of the recipe"
        ) from error
    return made


@functools.cache
def providers() -> tuple[str, ...]:
    """Execution providers to validate on: CPU, and CUDA where a session really gets it."""
    if CUDA not in ort.get_available_providers() or not torch.cuda.is_available():
        return (CPU,)
    try:
        session(_identity(), provider=CUDA)
    except ParityError:
        return (CPU,)
    return CUDA, CPU


@functools.cache
def overflows() -> bool:
    """Whether a session that does not ask for exact products computes others on this processor."""
    plain = ort.InferenceSession(_largest_products(), providers=[CPU])
    (sums,) = plain.run(None, {"codes": np.full((1, 8), 255, np.uint8)})
    return bool((sums != 255).any())


def _largest_products() -> bytes:
    """A model of one QLinearMatMul: uint8 "codes" (1, 8) times the largest INT8 weights; of 255s it makes 255."""
    constants = {
        "scale": np.float32(1),
        "zero": np.uint8(0),
        "weight": np.full((8, 1), 127, np.int8),
        "weight_zero": np.int8(0),
        "sum_scale": np.float32(8 * 127),
    }
    read = ("codes", "scale", "zero", "weight", "scale", "weight_zero", "sum_scale", "zero")
    node = onnx.helper.make_node("QLinearMatMul", read, ["sums"])
    kind = onnx.TensorProto.UINT8
    return _one_node(node, kind, {"codes": [1, 8]}, {"sums": [1, 1]}, constants)


def _identity() -> bytes:
    node = onnx.helper.make_node("Neg", ["x"], ["y"])
    return _one_node(node, onnx.TensorProto.FLOAT, {"x": [1]}, {"y": [1]}, {})


def _one_node(
    node: onnx.NodeProto,
    kind: int,
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
    constants: Mapping[str, Any],
) -> bytes:
    """A model of one node with inputs and outputs of one element type."""
    around = [
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    stored = [onnx.numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()]
    graph = onnx.helper.make_graph([node], "g", *around, stored)
    opset = [onnx.helper.make_opsetid("", 17)]
    made = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    return made.SerializeToString()  # type: ignore[no-any-return]


def latencies(
    models: Sequence[Path],
    inputs: Sequence[Tensor],
    *,
    runs: int = 20,
    threads: int = 1,
    exact_products: bool = False,
) -> list[float]:
    """Median milliseconds of one call of each model; they take turns, so that a busy machine is slow for all."""
    running = [session(m, threads=threads, exact_products=exact_products) for m in models]
    feeds = [feeds_of(one, inputs) for one in running]
    times: list[list[float]] = [[] for _ in models]
    for turn in range(runs + 1):
        for one, feed, seen in zip(running, feeds, times, strict=True):
            started = time.perf_counter()
            one.run(None, feed)
            if turn:
                seen.append(time.perf_counter() - started)
    return [1000 * float(np.median(seen)) for seen in times]


def feeds_of(running: ort.InferenceSession, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Inputs by the names that a session has for them, as bytes where the file takes bytes."""
    taken = of_metadata(running.get_modelmeta().custom_metadata_map)
    pairs = zip((one.name for one in running.get_inputs()), inputs, strict=True)
    return {name: given_to(taken, name, x).numpy() for name, x in pairs}
