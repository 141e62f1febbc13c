"""The figures of a report in words: size, accuracy, speed, and what other bits would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

SLOWER = 1.05
"""Times the float model's milliseconds: less is noise."""
_LOSS = 0.5
"""Points of top-1 that a user should hear of."""
_LARGEST_ERROR = 0.1
"""Of an output without classes, relative to float."""
_LEAST_AGREEMENT = 0.97
_WORTH = 0.9
"""Of a file: what a smaller one must be below to be named."""


def figures(report: Mapping[str, Any], file: Path) -> list[tuple[str, str]]:
    """Label and text of what counts: the file, its size, accuracy and speed."""
    lines = [("file", str(file)), ("size", file_size(report))]
    lines += [("accuracy", text) for text in accuracy_lines(report)]
    return [*lines, ("speed", speed(report))]


def verdict(report: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the file can be used as it is, and what to know first, in a sentence."""
    failures = report["validation"]["failures"]
    if failures:
        return False, f"The file does not compute what was trained: {failures[0]}."
    if report.get("slower_than_float"):
        return False, str(report["slower_than_float"])
    if lost_accuracy(report):
        return False, f"The file loses accuracy: {'; '.join(accuracy_lines(report))}."
    exact = "The file computes what was trained"
    if not accuracy_lines(report):
        return True, f"{exact}."
    return True, f"{exact}, and keeps to the float model."


def date_words(date: str) -> str:
    """A date of report.json without the letters between; as it is where it is none."""
    try:
        return datetime.fromisoformat(date).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return date


def file_size(report: Mapping[str, Any]) -> str:
    """Bytes of the file, and how they compare with the float model's."""
    own, whole = report["onnx_bytes"], report["float_onnx_bytes"]
    if not whole:
        return size(own)
    if own >= whole:
        return f"{size(own)}, no smaller than float ({size(whole)})"
    return f"{size(own)}, {whole / own:.1f} times smaller than float ({size(whole)})"


def size(count: float) -> str:
    """Bytes in KiB or MiB."""
    return f"{count / 2**20:.1f} MiB" if count >= 10 * 2**20 else f"{count / 1024:.0f} KiB"


def accuracy_lines(report: Mapping[str, Any]) -> list[str]:
    """Accuracy on labels where there are some, and every output beside the float model's."""
    lines = []
    accuracy = report["accuracy"]
    if accuracy is not None:
        what = report["metric"]
        ours, theirs = (number_of(accuracy[name], what) for name in ("onnx", "float"))
        lines.append(f"{what} {ours}, float {theirs}")
    several = len(report["outputs"]) > 1
    for one in report["outputs"]:
        name = f"{one['name']}: " if several else ""
        lines.append(f"{name}{likeness(one)}")
    return lines


def number_of(value: float | None, metric: str) -> str:
    """A score: top-1 in percent to a hundredth, a user's metric to five digits."""
    if value is None:
        return "not a number"
    return f"{value:.2f} %" if metric == "top-1" else f"{value:.5g}"


def likeness(output: Mapping[str, Any]) -> str:
    """How like an output is to the float model's: equal predictions, or relative error."""
    samples = f"{output['samples']} samples"
    if output["agreement"] is not None:
        return f"same prediction as float on {output['agreement']:.1%} of {samples}"
    return f"relative error {output['relative_error']:.2%} beside float, on {samples}"


def speed(report: Mapping[str, Any]) -> str:
    """Milliseconds a call, and how they compare with the float model's."""
    slow, fast = report["float_ms"], report["integer_ms"]
    call = f"{fast:.3g} ms a call of {report['batch']} on one thread of {report['processor']}"
    if not slow:
        return call
    if fast > SLOWER * slow:
        return f"{call}; slower than float ({slow:.3g} ms)"
    if slow < SLOWER * fast:
        return f"{call}; as fast as float ({slow:.3g} ms)"
    return f"{call}; {slow / fast:.1f} times as fast as float ({slow:.3g} ms)"


def lost_accuracy(report: Mapping[str, Any]) -> bool:
    """Whether the file is so far from the float model that a user should do something."""
    accuracy = report["accuracy"]
    if accuracy is not None and report["metric"] == "top-1" and None not in accuracy.values():
        return bool(accuracy["float"] - accuracy["onnx"] > _LOSS)
    return any(
        one["relative_error"] > _LARGEST_ERROR
        if one["agreement"] is None
        else one["agreement"] < _LEAST_AGREEMENT
        for one in report["outputs"]
    )


_PLUMBING_OF_A_LAYER = 2560
"""Bytes that a packed file leaves out: names, shapes, zero points; 2.7 KiB in the example, more in larger networks."""


def packed_estimate(report: Mapping[str, Any], bits: int) -> float | None:
    """Bytes of the file with the weights of the inner layers packed at `bits`; None where it is hardly smaller."""
    layers: Sequence[Mapping[str, Any]] = report["layers"]
    inner = sum(one["parameters"] for one in layers if str(one["source"]).startswith("recipe"))
    if report["profile"] != "container":
        return None
    estimate = report["onnx_bytes"] - inner * (1 - bits / 8) - _PLUMBING_OF_A_LAYER * len(layers)
    return float(estimate) if estimate < _WORTH * report["onnx_bytes"] else None
