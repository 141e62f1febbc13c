"""What a run found, for people and for machines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from sqakd_fx.diagnostics.wording import printable
from sqakd_fx.ir.pass_manager import LogEntry
from sqakd_fx.quant.levels import LARGEST_SUM
from sqakd_fx.results.figures import date_words, verdict
from sqakd_fx.runtime.session import EXACT_PRODUCTS
from sqakd_fx.targets import TARGETS
from sqakd_fx.validation.parity import TensorParity, first_divergence
from sqakd_fx.validation.verdict import Validation, departs_from_training

UNMEASURED = "accuracy was not measured: "
"""What the line begins with that says why."""
_WIDTH = 98
_MOST_REASONS, _MOST_CHECKS, _MOST_ROWS = 4, 7, 9
_FULL_RANGE = 'weight_range = "full": '


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


def markdown(report: Mapping[str, Any]) -> str:
    """report.md, of report.json: one screen, the verdict first and internal checks last."""
    _, sentence = verdict(report)
    return "\n".join(
        [
            f"# {plain(report['name'])}: {plain(report['recipe'])}",
            "",
            f"**{plain(sentence)}**",
            "",
            *_table(("", ""), _origin(report)),
            "",
            *_table(("", "float", "quantized"), _summary(report)),
            *_unmeasured(report),
            "",
            "## Bits, and what stays in float",
            "",
            *_items(_bits(report), *_in_float(report)),
            "",
            "## Checks",
            "",
            *_failures(report),
            *_items(*_checks(report)),
            "",
            "report.json holds every layer, note and check. `sqakd-fx report` with this folder draws them.",
            "",
        ]
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    head = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return [*head, *("| " + " | ".join(map(plain, row)) + " |" for row in rows)]


def _items(*lines: str) -> list[str]:
    return [f"- {plain(_clipped(line))}" for line in lines]


def _clipped(text: str) -> str:
    """A sentence that fits on a line of 100 characters."""
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1].rstrip()}…"


def _origin(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Date, machine, model, data, recipe."""
    data, samples = report["data"], report["validation"]["samples"]
    steps = f"{report['steps']} steps with batches of {data['batch_size']}"
    return [
        ("date", date_words(report["date"])),
        ("machine", report["processor"]),
        ("model", report["source"]),
        ("data", f"{data['training']}; checked on {samples} samples"),
        ("training", f"{steps}, seed {report['seed']}"),
        ("file", f"{report['bits']}, {report['profile']}, for {report['target']}"),
    ]


def _unmeasured(report: Mapping[str, Any]) -> list[str]:
    """Why there is no accuracy, where it was asked for."""
    lines = [line for line in report["validation_lines"] if line.startswith(UNMEASURED)]
    return ["", *map(plain, lines)] if lines else []


def _bits(report: Mapping[str, Any]) -> str:
    """How many layers have how many bits."""
    known = [one["weight_bits"] for one in report["layers"] if one["weight_bits"] is not None]
    counts = sorted(Counter(known).items())
    said = ", ".join(f"{bits} bits in {count} layers" for bits, count in counts)
    return f"weights: {said or 'none'}"


def _in_float(report: Mapping[str, Any]) -> list[str]:
    """What stays in float or was left alone, by reason: the most frequent reasons first."""
    nodes: dict[str, list[str]] = {}
    for note in report["stays_in_float"]:
        nodes.setdefault(note["reason"], []).append(note["node"])
    ordered = sorted(nodes.items(), key=lambda one: -len(one[1]))
    lines = [
        f"{reason} ({len(names)}: {', '.join(names[:3])}{', …' * (len(names) > 3)})"
        for reason, names in ordered[:_MOST_REASONS]
    ]
    if left := sum(len(names) for _, names in ordered[_MOST_REASONS:]):
        lines.append(f"and {left} more, each with its reason in report.json")
    return lines or ["nothing stays in float"]


def _failures(report: Mapping[str, Any]) -> list[str]:
    """What is wrong, and what a session has to ask for, as whole sentences."""
    lines = [f"FAILED: {one}" for one in report["validation"]["failures"][:2]]
    lines += [line for line in report["validation_lines"] if line.startswith(_FULL_RANGE)]
    return [
        part
        for line in lines
        for part in wrap(plain(line), _WIDTH, initial_indent="- ", subsequent_indent="  ")
    ][:_MOST_CHECKS]


def _checks(report: Mapping[str, Any]) -> list[str]:
    """The lines on what is deployed, and notes on the training."""
    aside = (UNMEASURED, "FAILED: ", _FULL_RANGE)
    lines = [
        line
        for line in report["validation_lines"]
        if not line.startswith(aside) and "optimization off" not in line
    ]
    notes = [f"training: {line}" for line in report["training_notes"]]
    return [*lines, *notes][: _MOST_CHECKS - len(_failures(report))]


def _summary(report: Mapping[str, Any]) -> list[Sequence[str]]:
    """The rows of the score, the size and the speed; of many outputs the first ones."""
    rows = list(report["summary"])
    if len(rows) <= _MOST_ROWS:
        return rows
    left = len(rows) - _MOST_ROWS + 1
    return [*rows[: _MOST_ROWS - 4], (f"{left} more outputs", "", "see report.json"), *rows[-3:]]


def validation_lines(validation: Validation) -> list[str]:
    """The verdict in sentences."""
    lines = [
        f"trained graph and integer program: {parity_line(validation.trained)}; same prediction on "
        f"{validation.student_agreement:.2%} of {validation.samples_by_code} samples (largest output difference "
        f"{validation.student_difference:.2g})"
    ]
    for runtime in validation.runtimes:
        unjudged = "" if runtime.judged else " (not judged: this processor has no VNNI)"
        lines.append(
            f"{runtime.title}: {parity_line(runtime.tensors)}; "
            f"same prediction as the trained graph on {runtime.agreement:.2%}{unjudged}"
        )
    if validation.samples_by_code < validation.samples:
        lines.append(
            f"quantized tensors were compared on {validation.samples_by_code} samples, what the file returns on "
            f"{validation.samples}"
        )
    if validation.sizes:
        lines.append(f"compared in the same way at inputs of {', '.join(validation.sizes)}")
    lines += pair_sum_lines(validation)
    lines += _target_lines(validation)
    fusion = validation.fusion
    integer = ", ".join(f"{count} {name}" for name, count in sorted(fusion.integer.items()))
    lines.append(f"integer kernels in the runtime's optimized graph: {integer or 'none'}")
    lines.append(
        f"convolutions, products and sums in float there: {float_operations(fusion.reasons)}"
    )
    lines += [f"FAILED: {failure}" for failure in validation.failures]
    return lines


def float_operations(reasons: Mapping[str, str]) -> str:
    """Operations with the reason of each; of many the first, and how many there are of each operator."""
    told = [f"{name}: {reason}" for name, reason in reasons.items()]
    if len(told) <= _MOST_REASONS:
        return "; ".join(told) or "none"
    kinds = Counter(name.rpartition("(")[2].rstrip(")") for name in reasons)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    few = "; ".join(told[: _MOST_REASONS - 1])
    return f"{len(told)} ({counts}), all of them in report.json or by validate --json; the first are {few}"


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
            f"{_FULL_RANGE}on x86 processors without 8-bit dot products (VNNI) sums overflow in ONNX Runtime "
            f"unless the session sets {EXACT_PRODUCTS} to 1"
        )
    return lines


def tensor_table(validation: Validation) -> str:
    """One line a quantized tensor, for the trained graph and each runtime: how many codes are how many steps off."""
    trained = validation.trained
    wrong = next(filter(departs_from_training, trained), None)
    lines = _tensor_lines("trained graph", trained, wrong or first_divergence(trained))
    for runtime in validation.runtimes:
        lines += _tensor_lines(runtime.title, runtime.tensors, first_divergence(runtime.tensors))
    return "\n".join(lines)


def _tensor_lines(
    title: str, tensors: Sequence[TensorParity], first: TensorParity | None
) -> list[str]:
    lines = [title]
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
