"""One training of the example, a file for every target, and what checks it: one table.

    pip install openvino executorch litert-torch qonnx    # each is optional; what is not installed is not run
    python benchmarks/targets.py [--steps 60] [--bits w8a8]

Files are validated on the first 512 test images. The last column is the runtime itself on the first 256, beside the
integer program in PyTorch. For QNN it is ONNX Runtime with the encodings applied, which is no QNN.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from sqakd_fx.errors import SqakdError
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.results.evaluate import validation_batches
from sqakd_fx.results.export import export
from sqakd_fx.source.inputs import source_inputs
from sqakd_fx.source.source import Source, load_source
from sqakd_fx.stages import calibrate, distil
from sqakd_fx.targets import TARGETS
from sqakd_fx.validation.validate import validate
from sqakd_fx.validation.verdict import RuntimeParity

ROOT = Path(__file__).parents[1]
HEAD = ("target", "file", "rules", "ONNX Runtime, codes", "predictions", "the runtime itself")


def trained(source: Source, bits: str, steps: int) -> Program:
    """The example's student on grids that every target takes."""
    recipe = {"preset": bits, "target": "tensorrt", "steps": steps, "compile": "never"}
    program = build_program(source.model, source.example_inputs, recipe)
    calibrate(program, source.train_data)
    if steps:
        distil(program, source.train_data)
    return program


def row(
    target: str, program: Program, lowered: torch.fx.GraphModule, source: Source, folder: Path
) -> list[str]:
    """What holds of the file of one target."""
    rules = len(TARGETS[target].rules)
    try:
        path = export(program, lowered, folder / f"{target}.onnx", target=target).path
    except SqakdError as error:
        return [target, f"not written: {error}", "", "", "", ""]
    size = f"{path.stat().st_size / 1024:.0f} KiB"
    if target not in ("onnxruntime", "tensorrt", "openvino"):
        images = next(batch[0] for batch in source.eval_data)[:256]
        return [target, size, str(rules), "not for it", "", _itself(target, path, lowered, images)]
    asked = "openvino" if target == "openvino" and find_spec("openvino") else "onnxruntime"
    inputs = source_inputs(source, program)
    batches = (batch for batch, _ in islice(validation_batches(source, program, inputs), 2))
    checked = validate(program.student, lowered, path, batches, runtime=asked)
    broken = [failure for failure in checked.failures if " wants that " in failure]
    own = [run for run in checked.runtimes if run.provider == "OpenVINO"]
    others = [run for run in checked.runtimes if run.provider != "OpenVINO"]
    agree = f"{checked.deployed.agreement:.2%} of {checked.samples}"
    kept = f"{rules - len(broken)} of {rules}"
    itself = "; ".join(f"{run.title}: {_codes([run])}, {run.agreement:.2%}" for run in own)
    return [target, size, kept, _codes(others), agree, itself or _installed(target)]


def _codes(runs: Sequence[RuntimeParity]) -> str:
    """How far codes are off, from the same codes."""
    tensors = [tensor for run in runs for tensor in run.tensors]
    worst = max(tensor.largest for tensor in tensors)
    off = sum(tensor.share_above(0) * tensor.elements for tensor in tensors)
    share = off / sum(tensor.elements for tensor in tensors)
    return "equal" if not worst else f"{share:.4%} off, by {worst} at most"


def _itself(target: str, path: Path, lowered: torch.fx.GraphModule, images: Tensor) -> str:
    """What the runtime of a target computes of images, beside the integer program."""
    runs, package = _RUNS[target]
    if find_spec(package) is None:
        return f"not run: {package} is not installed"
    with torch.no_grad():
        wanted = lowered(images)
    try:
        got = runs(path, images)
    except Exception as refused:
        return f"refused: {' '.join(str(refused).split())[:120]}"
    error = float((got - wanted).norm() / wanted.norm())
    same = float((got.argmax(1) == wanted.argmax(1)).float().mean())
    return f"error {error:.1e}, {same:.2%} of {len(images)} predictions"


def _in_executorch(path: Path, images: Tensor) -> Tensor:
    from executorch.runtime import Runtime
    from on_executorch import lowered_to_xnnpack

    fixed = torch.export.export(torch.export.load(path).module(), (images,))
    made, _ = lowered_to_xnnpack(fixed)
    method = Runtime.get().load_program(made.buffer).load_method("forward")
    (found,) = method.execute([images.contiguous()])
    return torch.as_tensor(found)


def _in_litert(path: Path, images: Tensor) -> Tensor:
    from on_litert import Running, converted

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.tflite"
        converted(path, [images], True).export(str(made))
        return torch.from_numpy(Running(made)([images])[0])


def _with_encodings(path: Path, images: Tensor) -> Tensor:
    import json

    import onnx
    import onnxruntime

    sys.path.insert(0, str(ROOT / "tests"))
    from other_forms import with_encodings_applied

    encodings = json.loads(path.with_suffix(".encodings").read_text("utf-8"))
    model = with_encodings_applied(onnx.load(str(path)), encodings)
    options = onnxruntime.SessionOptions()  # optimized, it quantizes the float weights again
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def _in_qonnx(path: Path, images: Tensor) -> Tensor:
    import onnx
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    onnx.IR_VERSION = 10  # qonnx makes a model of every operator, newer than ONNX Runtime reads
    model = ModelWrapper(str(path))
    given, made = model.graph.input[0], model.graph.output[0]
    for value in (given, made):
        value.type.tensor_type.shape.dim[0].dim_value = len(images)
    found = execute_onnx(model.transform(InferShapes()), {given.name: images.numpy()})
    return torch.from_numpy(found[made.name])


_RUNS: Mapping[str, tuple[Callable[[Path, Tensor], Tensor], str]] = {
    "executorch": (_in_executorch, "executorch"),
    "litert": (_in_litert, "litert_torch"),
    "qnn": (_with_encodings, "onnxruntime"),
    "qonnx": (_in_qonnx, "qonnx"),
}
"""What runs a target's file that ONNX Runtime does not, and the package that it needs."""


def _installed(target: str) -> str:
    if target == "onnxruntime":
        return "the columns before"
    try:
        return f"{TARGETS[target].package} {version(TARGETS[target].package)}: not run here"
    except PackageNotFoundError:
        return f"not run: {TARGETS[target].package} is not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bits", default="w8a8")
    options = parser.parse_args()
    source = load_source(str(ROOT / "examples" / "fashion" / "model.py"))
    program = trained(source, options.bits, options.steps)
    lowered = lower(program.student).graph_module
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            cells = row(target, program, lowered, source, Path(folder))
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
