"""Builds a TensorRT engine of each exported file and holds its outputs against ONNX Runtime's: one table.

    pip install tensorrt
    python benchmarks/tensorrt.py [FILE.onnx ...] [--batch 32]

Without a file it calibrates the example for `tensorrt` at W8A8 and W4A4. It needs an NVIDIA GPU, its driver and a torch
with CUDA; where one is missing it says so and ends. It is written by TensorRT's documentation and has built no engine
yet: the first who runs it sees whether TensorRT takes the files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

HEAD = ("file", "engine", "error to ONNX Runtime", "same predictions", "ms a batch")
_SIZES = {"height": 64, "width": 64}
"""Of axes that a file leaves open; others have 32."""


def why_not() -> str | None:
    """What is missing for an engine, in a sentence; None where nothing is."""
    sys.path[:] = [one for one in sys.path if Path(one or ".").resolve() != Path(__file__).parent]
    if find_spec("tensorrt") is None:
        return "no engine is built: the package tensorrt is not installed (pip install tensorrt)"
    if not torch.cuda.is_available():
        return "no engine is built: torch finds no GPU, which TensorRT needs"
    return None


def example_files(folder: Path) -> list[Path]:
    """The example, calibrated for TensorRT."""
    from sqakd_fx.program import build_program, lower
    from sqakd_fx.results.export import export
    from sqakd_fx.source.source import load_source
    from sqakd_fx.stages import calibrate

    source = load_source(str(Path(__file__).parents[1] / "examples" / "fashion" / "model.py"))
    found = []
    for bits in ("w8a8", "w4a4"):
        recipe = {"preset": bits, "target": "tensorrt"}
        program = build_program(source.model, source.example_inputs, recipe)
        calibrate(program, source.train_data)
        lowered = lower(program.student).graph_module
        found.append(export(program, lowered, folder / f"example-{bits}.onnx").path)
    return found


def random_inputs(session: onnxruntime.InferenceSession, batch: int) -> dict[str, Any]:
    """Inputs of the types and sizes of a file."""
    random = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [
            size if isinstance(size, int) else batch if size == "batch" else _SIZES.get(size, 32)
            for size in value.shape
        ]
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        if kind == "float":
            made[value.name] = random.standard_normal(shape, np.float32)
        else:
            made[value.name] = random.integers(0, 2, shape).astype(kind)
    return made


def engine_of(path: Path, inputs: dict[str, Any]) -> Any:
    """The engine of a file for these sizes. Raises RuntimeError with what TensorRT says."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        said = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise RuntimeError(said[0] if said else "the parser refuses the file")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, x in inputs.items():
        profile.set_shape(name, x.shape, x.shape, x.shape)
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise RuntimeError("the builder gives no engine")
    return trt.Runtime(logger).deserialize_cuda_engine(built)


def run(engine: Any, inputs: dict[str, Any], runs: int = 20) -> tuple[dict[str, Any], float]:
    """What an engine computes, and its milliseconds."""
    import tensorrt as trt

    context, held = engine.create_execution_context(), {}
    for name, x in inputs.items():
        context.set_input_shape(name, x.shape)
        held[name] = torch.from_numpy(x).cuda()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
    for name in outputs:
        kind = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        shape = tuple(context.get_tensor_shape(name))
        held[name] = torch.from_numpy(np.zeros(shape, kind)).cuda()
    for name, tensor in held.items():
        context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    context.execute_async_v3(stream.cuda_stream)
    begin.record(stream)
    for _ in range(runs):
        context.execute_async_v3(stream.cuda_stream)
    end.record(stream)
    torch.cuda.synchronize()
    return {name: held[name].cpu().numpy() for name in outputs}, begin.elapsed_time(end) / runs


def row(path: Path, batch: int) -> list[str]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = random_inputs(session, batch)
    names = [one.name for one in session.get_outputs()]
    wanted = dict(zip(names, session.run(names, inputs), strict=True))
    try:
        got, milliseconds = run(engine_of(path, inputs), inputs)
    except RuntimeError as refused:
        return [path.name, f"refused: {' '.join(str(refused).split())[:120]}", "", "", ""]
    floats = [name for name in names if wanted[name].dtype.kind == "f"]
    errors = [
        np.linalg.norm(got[n] - wanted[n]) / max(np.linalg.norm(wanted[n]), 1e-12) for n in floats
    ]
    same = [(got[n].argmax(-1) == wanted[n].argmax(-1)).mean() for n in floats]
    cells = [f"{max(errors):.2e}", f"{min(same):.2%}", f"{milliseconds:.3f}"]
    return [path.name, "built", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    if missing := why_not():
        raise SystemExit(missing)
    print(f"TensorRT {version('tensorrt')}, {torch.cuda.get_device_name()}\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory() as folder:
        for path in options.files or example_files(Path(folder)):
            print(f"| {' | '.join(row(path, options.batch))} |", flush=True)


if __name__ == "__main__":
    main()
