"""One row of the bench in a process of its own: makes a file, runs it, prints its figures as a line of JSON.

    python benchmarks/pretrained_rows.py NETWORK ROW FOLDER STEPS [NNCF_PYTHON]

`pretrained.py` starts it in the network's environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from pretrained_environments import NETWORKS
from pretrained_files import (
    CALIBRATION,
    Arrays,
    distance,
    flat,
    joined,
    load,
    network,
    outputs_of,
    save,
    session,
)
from torch import nn

from sqakd_fx.program import build_program
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.results.machine import processor_facts

OURS = {"w8a8": "w8a8", "accuracy": "accuracy", "w4a8": "w4a8", "w4a4": "w4a4"}


class RowFailed(Exception):
    """What a tool said where it made no file."""


def make_float(name: str, folder: Path) -> Path:
    """The float file, and the inputs and exact outputs that the other rows are judged by."""
    module = network(name)
    model = module.model().eval()
    save(folder / "calibration.npz", _calibration(module))
    pairs = module.eval_data() if hasattr(module, "eval_data") else None
    inputs = joined([flat(x) for x, _ in pairs] if pairs else [flat(x) for x in module.held_out()])
    if pairs:
        save(folder / "labels.npz", [np.concatenate([np.asarray(label) for _, label in pairs])])
    save(folder / "inputs.npz", inputs)
    example = module.example_inputs()
    args = tuple(example.values()) if isinstance(example, dict) else example
    args = args if isinstance(args, tuple) else (args,)
    save(folder / "exact.npz", _exact(model, inputs))
    path = folder / "float.onnx"
    batch = torch.export.Dim("batch")
    try:
        torch.onnx.export(
            model,
            args,
            path,
            dynamic_shapes=tuple({0: batch} for _ in args),
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError:  # some importers' modules; our graph of them it takes
        program = build_program(model, args, resolve_recipe("w8a8"))
        export(program, program.teacher, path, profile="float")
    return path


def _calibration(module: Any) -> Arrays:
    taken, count = [], 0
    for batch in module.train_data():
        taken.append(flat(batch))
        count += len(taken[-1][0])
        if count >= CALIBRATION:
            break
    return [value[:CALIBRATION] for value in joined(taken)]


def _exact(model: nn.Module, inputs: Arrays) -> Arrays:
    found = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), 16):
            output = model(*(torch.from_numpy(value[start : start + 16]) for value in inputs))
            found.append(flat(output))
    return joined(found)


def make_ours(bits: str, name: str, folder: Path, steps: int) -> Path:
    """What `sqakd-fx quantize` writes; a file that it calls different from the trained graph counts too."""
    out = folder / f"ours-{bits}"
    command = [sys.executable, "-m", "sqakd_fx", "quantize", str(NETWORKS / f"{name}.py")]
    command += ["--bits", bits, "--out", str(out), "--set", f"steps={steps}"]
    done = subprocess.run(command, capture_output=True, text=True)
    (folder / f"ours-{bits}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        told = [line for line in said if line.startswith("sqakd-fx: ")]
        raise RowFailed(f"exit {done.returncode}: {(told or said)[-1].removeprefix('sqakd-fx: ')}")
    return out / "model.onnx"


def prepared(folder: Path) -> Path:
    """The float file after the runtime's own preparation for quantization."""
    from onnxruntime.quantization import quant_pre_process

    path = folder / "ready.onnx"
    quant_pre_process(str(folder / "float.onnx"), str(path), skip_symbolic_shape=True)
    return path


def make_static(folder: Path) -> Path:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    calibration = load(folder / "calibration.npz")
    ready, path = prepared(folder), folder / "static.onnx"
    names = [given.name for given in session(ready).get_inputs()]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(
                {name: value[at : at + 1] for name, value in zip(names, calibration, strict=True)}
                for at in range(len(calibration[0]))
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rows, None)

    quantize_static(
        str(ready),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=not _has_byte_products(),
    )
    return path


def _has_byte_products() -> bool:
    """Whether this processor has VNNI; where it has not, `quantize_static` asks for 7-bit weights."""
    facts = processor_facts()
    return not facts or "vnni" in facts


def make_dynamic(folder: Path) -> Path:
    """Weights are unsigned where there are convolutions: the runtime has no other ConvInteger."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = onnx.load(prepared(folder))
    # the shapes noted for transposed weights would contradict those that it then makes
    whole.graph.ClearField("value_info")
    convolutions = any(node.op_type == "Conv" for node in whole.graph.node)
    kind = QuantType.QUInt8 if convolutions else QuantType.QInt8
    path = folder / "dynamic.onnx"
    quantize_dynamic(whole, str(path), weight_type=kind)
    return path


def make_nncf(folder: Path, python: str) -> Path:
    """NNCF's post-training quantization of the float file, in its own environment."""
    path = folder / "nncf.onnx"
    worker = Path(__file__).with_name("pretrained_nncf.py")
    done = subprocess.run(
        [python, str(worker), str(folder), str(path)], capture_output=True, text=True
    )
    if done.returncode:
        raise RowFailed((done.stderr.strip().splitlines() or ["no message"])[-1])
    return path


def made(name: str, row: str, folder: Path, steps: int, nncf: str) -> Path:
    makers: dict[str, Callable[[], Path]] = {
        "float": lambda: make_float(name, folder),
        "quantize_static": lambda: make_static(folder),
        "quantize_dynamic": lambda: make_dynamic(folder),
        "nncf": lambda: make_nncf(folder, nncf),
    }
    makers |= {f"ours {b}": lambda b=b: make_ours(b, name, folder, steps) for b in OURS}  # type: ignore[misc]
    return makers[row]()


def judged(name: str, path: Path, folder: Path) -> dict[str, Any]:
    """The figures of a file: its score, the distance of every output, its size."""
    module = network(name)
    exact = load(folder / "exact.npz")
    found = outputs_of(path, load(folder / "inputs.npz"))
    labels = load(folder / "labels.npz")[0] if (folder / "labels.npz").exists() else None
    distances = [distance(one, other) for one, other in zip(found, exact, strict=True)]
    return {
        "score": module.score(found, exact, labels),
        "outputs": [asdict(one) for one in distances],
        "bytes": path.stat().st_size
        + sum(p.stat().st_size for p in path.parent.glob(f"{path.name}.data*")),
        "samples": len(exact[0]),
    }


def main() -> None:
    name, row, given, steps, *nncf = sys.argv[1:]
    folder = Path(given)
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        path = made(name, row, folder, int(steps), *nncf)
        minutes = (time.perf_counter() - started) / 60
        answer = judged(name, path, folder) | {"minutes": minutes, "file": str(path)}
    except Exception as error:
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, RowFailed) else f"{type(error).__name__}: "
        answer = {"failed": f"{kind}{text}"[:400], "minutes": (time.perf_counter() - started) / 60}
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
