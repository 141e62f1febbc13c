"""What is measured of a finished run: accuracy, and size and speed of the file beside the float model's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sqakd_fx.errors import SourceError, SqakdError
from sqakd_fx.program import Program
from sqakd_fx.results.against_float import OutputDistance
from sqakd_fx.results.answers import Answers
from sqakd_fx.results.export import export
from sqakd_fx.results.farthest import FarSample
from sqakd_fx.results.figures import SLOWER
from sqakd_fx.runtime.node_times import NodeTime, longest_nodes
from sqakd_fx.runtime.session import latencies


@dataclass(frozen=True)
class Measured:
    """The figures; the float model's are None where it has no ONNX form.

    `accuracy` is by "float", "student" and "onnx"; None without labels, or where `unmeasured` says why. `outputs` holds
    the file beside the float model, without labels; `longest` the nodes that take longest of a file that is slower than
    the float model; `farthest` the samples on which both differ most.
    """

    accuracy: Mapping[str, float] | None
    unmeasured: str | None
    outputs: tuple[OutputDistance, ...]
    float_bytes: int | None
    float_ms: float | None
    onnx_bytes: int
    integer_ms: float
    longest: tuple[NodeTime, ...] = ()
    farthest: tuple[FarSample, ...] = ()

    @property
    def slower(self) -> float | None:
        """How many times the float model's time the file takes, where that is more than noise."""
        if self.float_ms is None or self.integer_ms <= SLOWER * self.float_ms:
            return None
        return self.integer_ms / self.float_ms


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
    float_bytes, float_ms, integer_ms = _beside_float(program, model_path, exact_products)
    measured = Measured(
        accuracy,
        unmeasured,
        answers.distances(),
        float_bytes,
        float_ms,
        model_path.stat().st_size,
        integer_ms,
        farthest=answers.farthest(),
    )
    if measured.slower is None:
        return measured
    longest = longest_nodes(model_path, program.example, exact_products=exact_products)
    return replace(measured, longest=tuple(longest))


def _beside_float(
    program: Program, model: Path, exact_products: bool
) -> tuple[int | None, float | None, float]:
    """Bytes and milliseconds a call of the float model as ONNX, None where it has none; milliseconds of ours."""
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "float.onnx", None
        try:
            export(program, program.student, path, profile="float")
            size = path.stat().st_size
            ours, real = latencies([model, path], program.example, exact_products=exact_products)
            return size, real, ours
        except SqakdError:
            pass
    (ours,) = latencies([model], program.example, exact_products=exact_products)
    return size, None, ours
