"""The report of a finished run, from what was measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, fx
from torch.utils.data import DataLoader, Dataset

from sqakd_fx.exporters.profiles import Exported
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.mixed_precision.sensitive import Relief
from sqakd_fx.program import Program, layer_facts
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.results import markdown as reporting
from sqakd_fx.results.against_float import OutputDistance
from sqakd_fx.results.machine import processor
from sqakd_fx.results.measure import Measured
from sqakd_fx.source.replay import Replay
from sqakd_fx.source.sizes import batch_size_of
from sqakd_fx.source.source import Source
from sqakd_fx.source.synthetic import SyntheticSamples
from sqakd_fx.storage import write_json, write_text
from sqakd_fx.targets import TARGETS
from sqakd_fx.training.loop import Distilled
from sqakd_fx.validation.verdict import Validation


@dataclass(frozen=True)
class Course:
    """What a run itself knows.

    Attributes:
        seconds: by stage.
        command: how it was called, where a command line did.
        batches: in an epoch of the training data.
        relief: the search for activations that cost the outputs too much; None where there was none.
    """

    seconds: Mapping[str, float]
    command: str | None
    batches: int
    relief: Relief | None


def make_report(
    source: Source,
    program: Program,
    distilled: Distilled,
    exported: Exported,
    checked: Validation,
    measured: Measured,
    course: Course,
) -> dict[str, Any]:
    """Everything that report.json holds: sizes, accuracy, speed, validation, timings."""
    facts = layer_facts(program.student)
    weights = sum(p.numel() for p in program.teacher.parameters())
    packed = _packed_bytes(weights, program.student)
    lines = reporting.validation_lines(checked)
    if measured.unmeasured is not None:
        lines.insert(0, f"{reporting.UNMEASURED}{measured.unmeasured}")
    metric = "metric" if source.metric else "top-1"
    summary = [
        *_accuracy_rows(metric if source.metric else "top-1 (%)", measured),
        *_output_rows(measured.outputs),
        ("ONNX file", _kib(measured.float_bytes), _kib(measured.onnx_bytes)),
        ("weights at their nominal bits", _kib(4 * weights), _kib(packed)),
        _speed_row(len(program.example[0]), measured),
    ]
    return {
        "name": source.name,
        "source": source.spec,
        "recipe": program.recipe.name,
        "version": version("sqakd-fx"),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "processor": processor(),
        "bits": f"w{program.recipe.weight_bits}a{program.recipe.activation_bits}",
        "profile": TARGETS[program.recipe.target].profile or program.recipe.profile,
        "target": program.recipe.target,
        "seed": program.recipe.seed,
        "metric": metric,
        "batch": len(program.example[0]),
        "summary": summary,
        **_figures(measured),
        "nominal_weight_bytes": packed,
        "loss": distilled.loss,
        "before_training": None if distilled.before is None else asdict(distilled.before),
        "after_training": None if distilled.after is None else asdict(distilled.after),
        "seconds": dict(course.seconds),
        "command": course.command,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "data": _data(source, program, course.batches),
        "steps": distilled.steps,
        "sensitive_tensors": None if course.relief is None else _search(course.relief),
        "training_notes": list(distilled.notes),
        "layers": [asdict(f) for f in facts],
        "stored_weights": [asdict(w) for w in exported.weights],
        "export_notes": list(exported.notes),
        "stays_in_float": [asdict(n) for n in program.notes],
        "validation": checked.as_dict(),
        "validation_lines": lines,
    }


def _figures(measured: Measured) -> dict[str, Any]:
    """What was measured, as report.json has it."""
    return {
        "slower_than_float": slower_sentence(measured),
        "accuracy": measured.accuracy,
        "outputs": [asdict(one) for one in measured.outputs],
        "float_onnx_bytes": measured.float_bytes,
        "onnx_bytes": measured.onnx_bytes,
        "float_ms": measured.float_ms,
        "integer_ms": measured.integer_ms,
        "farthest_samples": [asdict(one) for one in measured.farthest],
    }


def _data(source: Source, program: Program, batches: int) -> dict[str, Any]:
    """What was trained on, and what was validated and compared on."""
    return {
        "training": _words_of(source.train_data),
        "batches": batches,
        "batch_size": batch_size_of(program),
        "evaluation": None if source.eval_data is None else _words_of(source.eval_data),
    }


def _words_of(data: Any) -> str:
    """The kind of the data, and how many samples or batches it has, where it says so."""
    held: Any = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(held, SyntheticSamples):
        return held.sentence
    if isinstance(held, Tensor | np.ndarray):
        return f"{type(held).__name__} of shape {tuple(held.shape)}"
    name = "stream" if isinstance(held, Replay) else type(held).__name__
    try:
        return f"{name} of {len(held)} {'samples' if isinstance(held, Dataset) else 'batches'}"
    except Exception:
        return name


def _search(relief: Relief) -> dict[str, Any]:
    """Which 8-bit activations were measured, what each alone costs each output, and which are left in float."""
    chosen = {tensor.name for tensor in relief.chosen}
    return {
        "tolerances": list(relief.tolerances),
        "before": list(relief.before),
        "after": list(relief.after),
        "share_of_work": relief.share,
        "tensors": [
            {
                "quantizer": tensor.name,
                "errors": list(tensor.errors),
                "in_float": tensor.name in chosen,
                "layers": list(tensor.layers),
            }
            for tensor in relief.tensors
        ],
    }


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """report.json and report.md."""
    write_json(out / "report.json", report)
    write_text(out / "report.md", reporting.markdown(report))


def _packed_bytes(weights: int, student: fx.GraphModule) -> float:
    """Bytes of all weights: codes at their nominal bits, four for every other number.

    Layers that read their inputs in float, tables and recurrent layers have weights in codes as well.
    """
    modules = dict(student.named_modules())
    coded: dict[str, tuple[int, int]] = {}
    for node in student.graph.find_nodes(op="call_module"):
        quantizer = modules[str(node.target)]
        if isinstance(quantizer, Quantizer) and quantizer.role == "weight":
            tensor = constant_of(student, node.args[0])
            coded[str(node.target)] = (0 if tensor is None else tensor.numel(), quantizer.bits)
    other = weights - sum(count for count, _ in coded.values())
    return sum(count * bits / 8 for count, bits in coded.values()) + 4 * max(other, 0)


def _accuracy_rows(metric: str, measured: Measured) -> list[tuple[str, str, str]]:
    accuracy = measured.accuracy
    if accuracy is None:
        return []
    shown = {name: _digits(value, metric) for name, value in accuracy.items()}
    return [
        (metric, shown["float"], f"{shown['onnx']} (ONNX)"),
        (f"{metric}, PyTorch", shown["float"], shown["student"]),
    ]


def _digits(value: float, metric: str) -> str:
    """Percents to a hundredth; a user's metric, which may be a fraction, to five digits."""
    return f"{value:.5g}" if metric == "metric" else f"{value:.2f}"


def _output_rows(outputs: Sequence[OutputDistance]) -> list[tuple[str, str, str]]:
    """The file beside the float model, one row for each output."""
    return [
        (
            f"{'' if len(outputs) == 1 else f'{one.name}, '}beside float, {one.samples} samples",
            "",
            one.words,
        )
        for one in outputs
    ]


def _speed_row(batch: int, measured: Measured) -> tuple[str, str, str]:
    slow, fast = measured.float_ms, measured.integer_ms
    return (
        f"ms a call, batch {batch}, 1 thread",
        "–" if slow is None else f"{slow:.3f}",
        f"{fast:.3f}" + (f" ({slow / fast:.1f}x)" if slow else ""),
    )


def slower_sentence(measured: Measured) -> str | None:
    """That the file is slower than the float model, and where its time goes; None where it is not."""
    if measured.slower is None:
        return None
    parts = [f"{one.node} ({one.operator}) {one.share:.0%}" for one in measured.longest]
    return (
        f"The file is slower than the float model: {measured.integer_ms:.3f} ms a call, {measured.slower:.2f} times as "
        f"long. It spends most time in {', '.join(parts)}."
    )


def _kib(size: float | None) -> str:
    return "–" if size is None else f"{size / 1024:.0f} KiB"
