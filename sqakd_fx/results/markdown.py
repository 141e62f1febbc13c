"""What a run found, for people and for machines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqakd_fx.diagnostics.wording import printable
from sqakd_fx.ir.pass_manager import LogEntry, Note
from sqakd_fx.program import LayerFacts
from sqakd_fx.quant.levels import LARGEST_SUM
from sqakd_fx.runtime.session import EXACT_PRODUCTS
from sqakd_fx.targets import TARGETS
from sqakd_fx.validation.parity import TensorParity, first_divergence
from sqakd_fx.validation.verdict import Validation


def plain(text: Any) -> str:
    """Text that a Markdown reader shows as it is: no table, link, image or HTML comes of it."""
    shown = re.sub(r"([\\`*\[\]|~$])", r"\\\1", printable(str(text)))
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def parity_line(tensors: Sequence[TensorParity]) -> str:
    """One sentence on how far quantized tensors are from the integer program's."""
    worst = max(tensors, key=lambda t: (t.largest, t.share_above(0)), default=None)
    if worst is None:
        return "no quantized tensor to compare"
    if worst.largest == 0:
        return f"all {len(tensors)} quantized tensors equal, code by code"
    off = sum(t.elements * t.share_above(0) for t in tensors)
    total = sum(t.elements for t in tensors)
    return (
        f"{off / total:.4%} of the codes differ, at most {worst.largest} step"
        f"{'s' if worst.largest > 1 else ''} ({worst.name}, made by {worst.producer})"
    )


def markdown(report: Mapping[str, Any], layers: Sequence[LayerFacts], notes: Sequence[Note]) -> str:
    """report.md: sizes, bits, accuracy, speed, and what stayed in float with the reason."""
    lines = [f"# {plain(report['name'])}: {plain(report['recipe'])}", ""]
    if report.get("slower_than_float"):
        lines += [f"**{plain(report['slower_than_float'])}**", ""]
    lines += ["| | float | quantized |", "|---|---|---|"]
    lines += ["| " + " | ".join(map(plain, row)) + " |" for row in report["summary"]]
    lines += ["", "## Layers", ""]
    lines += [
        "| layer | operation | weights | input | family | KiB | bits from |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in layers:
        weight = "–" if layer.weight_bits is None else f"{layer.weight_bits} bits"
        row = (
            layer.name,
            layer.operation,
            weight,
            f"{layer.activation_bits} bits",
            layer.weight_family or "–",
            f"{layer.weight_bytes / 1024:.1f}",
            layer.source,
        )
        lines.append("| " + " | ".join(map(plain, row)) + " |")
    lines += ["", "## What stays in float, or was left alone", ""]
    lines += [f"- {plain(note.node)}: {plain(note.reason)}" for note in notes] or ["- nothing"]
    lines += ["", "## Validation", ""]
    lines += [f"- {plain(line)}" for line in report["validation_lines"]]
    if report.get("training_notes"):
        lines += ["", "## Training", ""] + [f"- {plain(line)}" for line in report["training_notes"]]
    return "\n".join(lines) + "\n"


def validation_lines(validation: Validation) -> list[str]:
    """The verdict in sentences."""
    lines = [
        f"trained graph and integer program: {parity_line(validation.trained)}; same prediction on "
        f"{validation.student_agreement:.2%} of {validation.samples} samples (largest output difference "
        f"{validation.student_difference:.2g})"
    ]
    for runtime in validation.runtimes:
        unjudged = "" if runtime.judged else " (not judged: this processor has no VNNI)"
        lines.append(
            f"{runtime.title}: {parity_line(runtime.tensors)}; "
            f"same prediction as the trained graph on {runtime.agreement:.2%}{unjudged}"
        )
    lines += pair_sum_lines(validation)
    lines += _target_lines(validation)
    fusion = validation.fusion
    integer = ", ".join(f"{count} {name}" for name, count in sorted(fusion.integer.items()))
    lines.append(f"integer kernels in the runtime's optimized graph: {integer or 'none'}")
    heavy = "; ".join(f"{name}: {reason}" for name, reason in fusion.reasons.items())
    lines.append(f"convolutions, products and sums in float there: {heavy or 'none'}")
    lines += [f"FAILED: {failure}" for failure in validation.failures]
    return lines


def _target_lines(validation: Validation) -> list[str]:
    """What was checked of a target other than ONNX Runtime, and what it has been seen on."""
    target = TARGETS[validation.target]
    broken = any(failure.startswith(f"{target.title} wants") for failure in validation.failures)
    if not target.rules or broken:
        return []
    return [
        f"the file keeps the {len(target.rules)} rules of {target.title}; run on it so far: {target.seen}"
    ]


def pair_sum_lines(validation: Validation) -> list[str]:
    """Whether sums of two products fit in 16 bits, as x86 kernels without VNNI add them."""
    most = max(validation.pair_sums, key=lambda pair: pair.largest, default=None)
    if most is None:
        return []
    found = f"the largest sum of two products is {most.largest} ({most.layer})"
    if not most.overflows:
        return [
            f"{found}, of {LARGEST_SUM} that fit: exact on every processor with default options"
        ]
    lines = [f"{found}, of {LARGEST_SUM} that fit in 16 bits"]
    if validation.full_range:
        lines.append(
            'weight_range = "full": on x86 processors without 8-bit dot products (VNNI) sums overflow in ONNX Runtime '
            f"unless the session sets {EXACT_PRODUCTS} to 1"
        )
    return lines


def tensor_table(validation: Validation) -> str:
    """One line a quantized tensor, for the trained graph and each runtime: how many codes are how many steps off."""
    lines = _tensor_lines("trained graph", validation.trained)
    for runtime in validation.runtimes:
        lines += _tensor_lines(runtime.title, runtime.tensors)
    return "\n".join(lines)


def _tensor_lines(title: str, tensors: Sequence[TensorParity]) -> list[str]:
    lines = [title]
    first = first_divergence(tensors)
    if first is not None:
        lines.append(f"  first divergence: {first.name}, made by {first.producer}")
    for tensor in tensors:
        steps = ", ".join(
            f"{count} off by {step}" for step, count in tensor.histogram.items() if step
        )
        lines.append(
            f"  {tensor.name} ({tensor.producer}): {tensor.elements} codes, {steps or 'all equal'}"
        )
    return lines


def log_as_json(log: Sequence[LogEntry]) -> list[dict[str, Any]]:
    """The compile log."""
    return [asdict(entry) for entry in log]
