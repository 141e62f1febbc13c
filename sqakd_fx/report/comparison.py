"""Several results beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqakd_fx.report.held import Held
from sqakd_fx.results.figures import date_words, number_of, size

UNKNOWN = "–"


def rows(results: Sequence[Held]) -> list[tuple[str, list[str]]]:
    """Label and a text for each result; a row that says nothing of any is left out."""
    made = {
        "verdict": [_verdict(one) for one in results],
        "score": [_score(one, "onnx") for one in results],
        "float": [_score(one, "float") for one in results],
        "like float": [_likeness(one) for one in results],
        "size": [size(one.raw["onnx_bytes"]) for one in results],
        "of float": [_ratio(one.raw["onnx_bytes"], one.raw["float_onnx_bytes"]) for one in results],
        "time": [f"{one.raw['integer_ms']:.3g} ms" for one in results],
        "of float's": [_ratio(one.raw["integer_ms"], one.raw["float_ms"]) for one in results],
        "batch": [str(one.raw["batch"]) for one in results],
        "bits": [one.report.bits for one in results],
        "file": [f"{one.report.profile}, {one.report.target}" for one in results],
        "steps": [_text(one.report.steps) for one in results],
        "seed": [str(one.report.seed) for one in results],
        "model": [one.report.source for one in results],
        "data": [_text(one.report.data and one.report.data.training) for one in results],
        "checked on": [f"{one.report.validation.samples} samples" for one in results],
        "machine": [one.report.processor for one in results],
        "runtime": [one.report.onnxruntime for one in results],
        "date": [date_words(one.report.date) for one in results],
    }
    return [(label, cells) for label, cells in made.items() if set(cells) != {UNKNOWN}]


def _text(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def _ratio(own: float, whole: float | None) -> str:
    return f"{own / whole:.2f}" if whole else UNKNOWN


def _verdict(one: Held) -> str:
    if one.report.validation.failures:
        return "wrong file"
    return "slower than float" if one.raw["slower_than_float"] else "passed"


def _score(one: Held, model: str) -> str:
    """Of the model "onnx" or "float"."""
    accuracy, metric = one.raw["accuracy"], one.raw["metric"]
    return UNKNOWN if accuracy is None else f"{metric} {number_of(accuracy.get(model), metric)}"


def _likeness(one: Held) -> str:
    """The output that is farthest from the float model's."""
    outputs = one.report.outputs
    if not outputs:
        return UNKNOWN
    known = [output for output in outputs if output.agreement is not None]
    if known:
        return f"same prediction {min(output.agreement or 0.0 for output in known):.2%}"
    worst = max(outputs, key=lambda output: output.relative_error)
    return f"error {worst.relative_error:.2%}, cosine {worst.cosine:.4f}"


def cautions(results: Sequence[Held]) -> list[str]:
    """What makes figures of these results no comparison."""
    found = []
    if _differ(one.report.processor for one in results):
        found.append("the machines differ: times are not comparable, those beside float's are")
    if _differ(one.raw["batch"] for one in results):
        found.append("the batch sizes of the timed calls differ")
    if _differ(one.report.source for one in results):
        found.append("the models differ, or are named by other paths")
    if _differ(one.report.validation.samples for one in results):
        found.append("the numbers of samples differ that were checked")
    return found


def _differ(values: Any) -> bool:
    return len(set(values)) > 1


def as_json(results: Sequence[Held]) -> list[dict[str, Any]]:
    """The figures as numbers, one entry for each result."""
    return [
        {
            "folder": str(one.folder),
            "name": one.report.name,
            "source": one.report.source,
            "recipe": one.report.recipe,
            "bits": one.report.bits,
            "profile": one.report.profile,
            "target": one.report.target,
            "passed": not one.report.validation.failures,
            "metric": one.raw["metric"],
            "accuracy": one.raw["accuracy"],
            "outputs": one.raw["outputs"],
            "onnx_bytes": one.raw["onnx_bytes"],
            "float_onnx_bytes": one.raw["float_onnx_bytes"],
            "integer_ms": one.raw["integer_ms"],
            "float_ms": one.raw["float_ms"],
            "batch": one.raw["batch"],
            "steps": one.report.steps,
            "seed": one.report.seed,
            "data": None if one.report.data is None else asdict(one.report.data),
            "samples": one.report.validation.samples,
            "processor": one.report.processor,
            "onnxruntime": one.report.onnxruntime,
            "date": one.report.date,
        }
        for one in results
    ]
