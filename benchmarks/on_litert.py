"""Networks as `litert` programs, converted to .tflite and run by LiteRT on the CPU: one table.

    python benchmarks/on_litert.py --write FOLDER              # here: programs, inputs and what they give
    pip install torch==2.13.0 litert-torch                     # in an environment of its own
    python benchmarks/on_litert.py FOLDER                      # there

Each network is calibrated, not trained; W8A8. The converter makes INT8 inputs of floats that are quantized at once:
they are quantized here by the scale that the file tells. × is against the float model, converted as well. Milliseconds
are the median of seven calls of one sample.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

CALLS = 7
HEAD = ("network", "KiB", "operations", "error to the integer program", "same predictions")
HEAD += ("ms, × float",)


def write(folder: Path) -> None:
    """A program, its float model and one sample for each network."""
    from small_and_large import NAMES, network

    from sqakd_fx.errors import SqakdError
    from sqakd_fx.program import build_program, lower
    from sqakd_fx.quant.calibration import calibrate
    from sqakd_fx.results.export import export

    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        model, inputs = network(name)
        try:
            program = build_program(model, inputs, "w8a8")
            example = program.traced.call.flatten(inputs, {})
            calibrate(program.student, [example], method="minmax")
            lowered = lower(program.student).graph_module
            export(program, lowered, folder / f"{name}.pt2", target="litert")
        except SqakdError as refused:
            print(f"{name} is not written: {refused}", file=sys.stderr)
            continue
        with torch.no_grad():
            wanted = torch.utils._pytree.tree_leaves(lowered(*example))
        torch.export.save(torch.export.export(model, inputs), folder / f"{name}.float.pt2")
        torch.save({"inputs": list(example), "outputs": wanted}, folder / f"{name}.samples")


def converted(program: Path, inputs: list[torch.Tensor], integer: bool) -> Any:
    """What litert-torch makes of a program for inputs of these sizes."""
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import (
        PT2EQuantizer,
        get_symmetric_quantization_config,
    )
    from litert_torch.quantize.quant_config import QuantConfig

    said = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    how = {"quant_config": QuantConfig(pt2e_quantizer=said)} if integer else {}
    return litert_torch.convert(torch.export.load(program).module(), tuple(inputs), **how)


class Running:
    """A .tflite file in LiteRT's interpreter."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(str(path))
        self.interpreter.allocate_tensors()

    def __call__(self, inputs: list[torch.Tensor]) -> list[np.ndarray]:
        details = sorted(self.interpreter.get_input_details(), key=lambda one: str(one["name"]))
        for given, x in zip(details, inputs, strict=True):
            self.interpreter.set_tensor(given["index"], _as(given, x.numpy()))
        self.interpreter.invoke()
        outputs = sorted(self.interpreter.get_output_details(), key=lambda one: str(one["name"]))
        return [_real(made, self.interpreter.get_tensor(made["index"])) for made in outputs]

    def milliseconds(self) -> float:
        took = []
        for _ in range(CALLS):
            start = time.perf_counter()
            self.interpreter.invoke()
            took.append(time.perf_counter() - start)
        return 1000 * statistics.median(took)

    def operations(self) -> Counter[str]:
        names = [one["op_name"] for one in self.interpreter._get_ops_details()]
        return Counter(name for name in names if name != "DELEGATE")


def _as(given: dict[str, Any], x: np.ndarray) -> np.ndarray:
    scale, point = given["quantization"]
    if given["dtype"] == np.int8:
        return np.clip(np.round(x / np.float32(scale)) + point, -128, 127).astype(np.int8)
    return x.astype(given["dtype"])


def _real(made: dict[str, Any], y: np.ndarray) -> np.ndarray:
    scale, point = made["quantization"]
    return (y.astype(np.float32) - point) * np.float32(scale) if y.dtype == np.int8 else y


def row(folder: Path, name: str, scratch: Path) -> list[str]:
    """What LiteRT makes of one network."""
    samples = torch.load(folder / f"{name}.samples", weights_only=True)
    inputs, wanted = samples["inputs"], [y.numpy() for y in samples["outputs"]]
    path, float_path = scratch / "model.tflite", scratch / "float.tflite"
    try:
        converted(folder / f"{name}.pt2", inputs, True).export(str(path))
        running = Running(path)
        got = running(inputs)
    except Exception as refused:
        return [name, f"refused: {' '.join(str(refused).split())[:120]}", *[""] * 4]
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, wanted, strict=True)]
    same = [(a.argmax(-1) == b.argmax(-1)).mean() for a, b in zip(got, wanted, strict=True)]
    took, against = running.milliseconds(), "–"
    try:
        converted(folder / f"{name}.float.pt2", inputs, False).export(str(float_path))
        in_float = Running(float_path)
        in_float(inputs)
        against = f"{took / in_float.milliseconds():.2f}"
    except Exception as refused:
        print(f"{name} in float: {refused}", file=sys.stderr)
    ran = ", ".join(f"{op} {n}" for op, n in running.operations().most_common(6))
    return [
        name,
        f"{path.stat().st_size / 1024:.0f}",
        ran,
        f"{max(errors):.1e}",
        f"{min(same):.2%}",
        f"{took:.2f}, {against}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write:
        return write(options.folder)
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (registers quantized_decomposed)

    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    names = sorted(path.stem for path in options.folder.glob("*.samples"))
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            print(f"| {' | '.join(row(options.folder, name, Path(scratch)))} |", flush=True)
    return None


if __name__ == "__main__":
    main()
