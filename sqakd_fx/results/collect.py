"""The figures of a finished run: sizes, accuracy, speed, validation, timings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqakd_fx.errors import SourceError, SqakdError
from sqakd_fx.exporters.profiles import Exported, write_profile
from sqakd_fx.program import Program, layer_facts
from sqakd_fx.recipe import Recipe
from sqakd_fx.results import markdown as reporting
from sqakd_fx.results.evaluate import evaluate
from sqakd_fx.results.export import export_job
from sqakd_fx.runtime.session import latency, session
from sqakd_fx.source.source import Source
from sqakd_fx.validation.validate import Validation


def make_report(
    source: Source,
    program: Program,
    recipe: Recipe,
    checked: Validation,
    exported: Exported,
    timings: Mapping[str, float],
    training_notes: Iterable[str],
    loss: float,
) -> dict[str, Any]:
    """Everything the result table shows: sizes, accuracy, speed, validation, timings."""
    model_path = exported.path
    running = session(model_path)
    names = [i.name for i in running.get_inputs()]

    def integer_onnx(*inputs: Tensor) -> list[Tensor]:
        feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in running.run(None, feeds)]

    lines = reporting.validation_lines(checked)
    functions: dict[str, Callable[..., Any]] = {
        "float": program.teacher,
        "student": program.student,
        "onnx": integer_onnx,
    }
    try:
        accuracy = evaluate(source, program, functions)
    except SourceError as error:
        accuracy = None
        lines.insert(0, f"accuracy was not measured: {error}")
    example = program.example
    with tempfile.TemporaryDirectory() as folder:
        float_path = Path(folder) / "float.onnx"
        float_bytes, float_ms = None, None
        try:
            write_profile("float", export_job(program.student, program, recipe), float_path)
            float_bytes = float_path.stat().st_size
            float_ms = latency(float_path, example)
        except SqakdError:
            pass
    integer_ms = latency(model_path, example)
    weights = sum(p.numel() for p in program.teacher.parameters())
    facts = layer_facts(program.student)
    coded = sum(f.parameters for f in facts)
    packed = sum(f.weight_bytes for f in facts) + 4 * max(weights - coded, 0)
    metric = "metric" if source.metric else "top-1 (%)"
    summary: list[tuple[str, str, str]] = []
    if accuracy is not None:
        summary.append((metric, f"{accuracy['float']:.2f}", f"{accuracy['onnx']:.2f} (ONNX)"))
        summary.append(
            (f"{metric}, PyTorch", f"{accuracy['float']:.2f}", f"{accuracy['student']:.2f}")
        )
    full = next(r for r in checked.runtimes if r.optimization == "full")
    summary += [
        ("same prediction as the trained graph", "", f"{full.agreement:.2%}"),
        ("ONNX file", _kib(float_bytes), _kib(model_path.stat().st_size)),
        ("weights at their nominal bits", _kib(4 * weights), _kib(packed)),
        (
            f"ms a call, batch {len(example[0])}, 1 thread",
            "–" if float_ms is None else f"{float_ms:.3f}",
            f"{integer_ms:.3f}" + (f" ({float_ms / integer_ms:.1f}x)" if float_ms else ""),
        ),
    ]
    return {
        "name": source.name,
        "source": source.spec,
        "recipe": recipe.name,
        "version": version("sqakd-fx"),
        "torch": torch.__version__,
        "summary": summary,
        "accuracy": accuracy,
        "float_onnx_bytes": float_bytes,
        "onnx_bytes": model_path.stat().st_size,
        "nominal_weight_bytes": packed,
        "float_ms": float_ms,
        "integer_ms": integer_ms,
        "loss": loss,
        "seconds": dict(timings),
        "training_notes": list(training_notes),
        "layers": [asdict(f) for f in facts],
        "stored_weights": [asdict(w) for w in exported.weights],
        "export_notes": list(exported.notes),
        "stays_in_float": [asdict(n) for n in program.notes],
        "validation": checked.as_dict(),
        "validation_lines": lines,
    }


def _kib(size: float | None) -> str:
    return "–" if size is None else f"{size / 1024:.0f} KiB"
