"""What is measured of a finished run: accuracy, and size and speed of the file beside the float model's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqakd_fx.errors import SourceError, SqakdError
from sqakd_fx.program import Program
from sqakd_fx.results.against_float import OutputDistance
from sqakd_fx.results.answers import Answers
from sqakd_fx.results.export import export
from sqakd_fx.runtime.session import latency


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
    program: Program, model_path: Path, answers: Answers, *, exact_products: bool
) -> Measured:
    """Figures from what was answered while the file was validated; size and speed of the file and the float model.

    `exact_products`: as the session asks that the file was judged in.
    """
    accuracy, unmeasured = None, None
    try:
        accuracy = answers.accuracy()
    except SourceError as error:
        unmeasured = str(error)
    float_bytes, float_ms = _float_file(program)
    return Measured(
        accuracy,
        unmeasured,
        answers.distances(),
        float_bytes,
        float_ms,
        model_path.stat().st_size,
        latency(model_path, program.example, exact_products=exact_products),
    )


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
