"""Files in Qualcomm's own kernels: the HTP (NPU) emulator that onnxruntime-qnn brings for x86_64. One table.

    python benchmarks/on_qnn.py --write FOLDER                 # here: files, inputs and what they give
    pip install onnxruntime-qnn numpy                          # in an environment of its own
    python benchmarks/on_qnn.py FOLDER                         # there

The example is trained for 20 steps, the other networks are calibrated with random weights. `container` is the form of
ONNX Runtime, `tensorrt` the form with a QuantizeLinear/DequantizeLinear pair at every reader. The emulator takes one
batch size. A cell says how many nodes of the optimized file are in QNN's parts and which are left to the CPU, how far
the outputs are from ONNX Runtime's on the CPU, and how many predictions are the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
NAMES = ("residual", "attention", "functional", "resnet18")
BATCH = 50
HEAD = (
    "network",
    "form",
    "parts in QNN",
    "left to the CPU",
    "error to the CPU",
    "same predictions",
    "seconds to prepare",
)


def write(folder: Path) -> None:
    """A file and its inputs for each network and form."""
    from small_and_large import network

    from sqakd_fx.program import build_program
    from sqakd_fx.source.source import load_source
    from sqakd_fx.stages import calibrate, distil

    folder.mkdir(parents=True, exist_ok=True)
    source = load_source(str(ROOT / "examples" / "fashion" / "model.py"))
    images = next(batch[0] for batch in source.eval_data)[: 4 * BATCH]
    for form in ("container", "tensorrt"):
        recipe = {"preset": "w8a8", "target": "onnxruntime" if form == "container" else form}
        program = build_program(
            source.model, source.example_inputs, recipe | {"steps": 20, "compile": "never"}
        )
        calibrate(program, source.train_data)
        distil(program, source.train_data)
        _save(program, (images,), folder / f"the example.{form}.onnx")
        for name in NAMES:
            model, inputs = network(name, samples=2)
            other = build_program(model, inputs, recipe)
            calibrate(other, [inputs])
            _save(other, inputs, folder / f"{name}.{form}.onnx")


def _save(program: Any, inputs: tuple[Any, ...], path: Path) -> None:
    from sqakd_fx.program import lower
    from sqakd_fx.results.export import export

    lowered = lower(program.student).graph_module
    if path.stem.endswith("tensorrt"):
        export(program, lowered, path, target="tensorrt")
    else:
        export(program, lowered, path)
    np.savez(path.with_suffix(".npz"), *[x.numpy() for x in inputs])


def session(path: Path, batch: int, profile: str) -> Any:
    """A session whose nodes QNN's HTP takes where it can."""
    import onnxruntime
    import onnxruntime_qnn

    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == onnxruntime_qnn.EP_NAME]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_provider_for_devices(devices, {"backend_path": onnxruntime_qnn.get_qnn_htp_path()})
    options.add_free_dimension_override_by_name("batch", batch)
    options.enable_profiling, options.profile_file_prefix = True, profile
    running = onnxruntime.InferenceSession(str(path), options)
    running.disable_fallback()
    return running


def where(events: list[dict[str, Any]]) -> tuple[int, str]:
    """Of one run: parts in QNN, and the operations of the CPU."""
    ran = Counter(
        (event["args"]["provider"], event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node" and "kernel_time" in event["name"]
    )
    parts = sum(n for (provider, _), n in ran.items() if provider.startswith("QNN"))
    cpu = [f"{op} {n}" for (provider, op), n in ran.items() if not provider.startswith("QNN")]
    return parts, ", ".join(sorted(cpu)) or "none"


def row(path: Path, profile: str) -> list[str]:
    import onnxruntime

    name, form = path.stem.rsplit(".", 1)
    stored = np.load(path.with_suffix(".npz"))
    given = [stored[key] for key in stored.files]
    cpu = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in cpu.get_inputs()]
    batch = min(BATCH, len(given[0]))
    feeds = [
        dict(zip(names, (x[start : start + batch] for x in given), strict=True))
        for start in range(0, len(given[0]), batch)
    ]
    start = time.monotonic()
    try:
        running = session(path, batch, profile)
        took = time.monotonic() - start
        got = [running.run(None, feed)[0] for feed in feeds]
    except Exception as refused:
        said = " ".join(str(refused).split())
        return [name, form, f"refused: {said[said.find('FAIL') :][:150]}", *[""] * 4]
    wanted = [cpu.run(None, feed)[0] for feed in feeds]
    events = json.loads(Path(running.end_profiling()).read_text())
    parts, left = where(events)
    found, right = np.concatenate(got), np.concatenate(wanted)
    error = np.linalg.norm(found - right) / np.linalg.norm(right)
    same = (found.argmax(-1) == right.argmax(-1)).mean()
    return [
        name,
        form,
        str(parts // len(feeds)),
        left,
        f"{error:.1e}",
        f"{same:.2%} of {found[..., 0].size}",
        f"{took:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write:
        return write(options.folder)
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.register_execution_provider_library(
        onnxruntime_qnn.get_ep_name(), onnxruntime_qnn.get_library_path()
    )
    print(f"onnxruntime-qnn {onnxruntime_qnn.__version__}, onnxruntime {onnxruntime.__version__}\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted(options.folder.glob("*.onnx")):
            print(f"| {' | '.join(row(path, f'{scratch}/profile'))} |", flush=True)
    return None


if __name__ == "__main__":
    main()
