"""What is measured of a finished run: accuracy, and size and speed of the file beside the float model's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from sqakd_fx.errors import SourceError, SqakdError
from sqakd_fx.program import Program
from sqakd_fx.results.against_float import OutputDistance, against_float
from sqakd_fx.results.evaluate import evaluate
from sqakd_fx.results.export import export
from sqakd_fx.runtime.session import latency, session
from sqakd_fx.source.source import Source


@dataclass(frozen=True)
class Measured:
    """The figures; the float model's are None where it has no ONNX form.

    `accuracy` is by "float", "student" and "onnx"; None without labels, or where `unmeasured` says why. `outputs` holds
    the file beside the float model, without labels.
    """

    accuracy: Mapping[str, float] | None
    unmeasured: str | None
    outputs: tuple[OutputDistance, ...]
    float_bytes: int | None
    float_ms: float | None
    onnx_bytes: int
    integer_ms: float


def measure(
    source: Source,
    program: Program,
    model_path: Path,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    exact_products: bool,
) -> Measured:
    """Run the exported file and the float model: on `batches`, on the source's labels and on the example.

    `exact_products`: as the session asks that the file was judged in.
    """
    accuracy, unmeasured = None, None
    try:
        running = session(model_path, exact_products=exact_products)
        accuracy = _accuracy(source, program, running)
    except SourceError as error:
        unmeasured = str(error)
    float_bytes, float_ms = _float_file(program)
    return Measured(
        accuracy,
        unmeasured,
        against_float(program, model_path, batches, exact_products=exact_products),
        float_bytes,
        float_ms,
        model_path.stat().st_size,
        latency(model_path, program.example, exact_products=exact_products),
    )


def _accuracy(
    source: Source, program: Program, running: ort.InferenceSession
) -> dict[str, float] | None:
    names = [i.name for i in running.get_inputs()]

    def integer_onnx(*inputs: Tensor) -> list[Tensor]:
        feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in running.run(None, feeds)]

    functions: dict[str, Callable[..., Any]] = {
        "float": program.teacher,
        "student": program.student,
        "onnx": integer_onnx,
    }
    return evaluate(source, program, functions)


def _float_file(program: Program) -> tuple[int | None, float | None]:
    """Bytes, and milliseconds a call, of the float model as ONNX; None for what cannot be had."""
    size: int | None = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        try:
            export(program, program.student, path, profile="float")
            size = path.stat().st_size
            return size, latency(path, program.example)
        except SqakdError:
            return size, None
