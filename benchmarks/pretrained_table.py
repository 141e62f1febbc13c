"""The bench's figures as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = (
    "| network | row | score | cosine | relative error | MB | ms, × float | minutes |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table(
    known: Mapping[tuple[str, str], dict[str, Any]],
    facts: Mapping[str, Mapping[str, object]],
    versions: str,
) -> str:
    """A line for each (network, row), then what each network is, its score and its inputs."""
    lines = [versions, "", HEAD]
    for (name, row), line in sorted(
        known.items(), key=lambda item: (item[0][0], _order(item[0][1]))
    ):
        if name in facts:
            lines.append(_line(name, row, line, known.get((name, "float"), {})))
    lines += ["", "| network | family | packages | score | inputs |", "|---|---|---|---|---|"]
    for name, constants in facts.items():
        packages = constants.get("WEIGHTS", ())
        assert isinstance(packages, tuple)
        cells = (
            name,
            constants.get("FAMILY"),
            ", ".join(packages),
            constants.get("SCORE"),
            constants.get("INPUTS"),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _order(row: str) -> tuple[int, str]:
    return (0 if row == "float" else 1 if row.startswith("ours") else 2, row)


def _line(name: str, row: str, line: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    steps = f", {line['steps']} steps" if line.get("steps") is not None else ""
    if "failed" in line:
        return f"| {name} | {row}{steps} | failed: {line['failed'].replace('|', '/')} | | | | | {line['minutes']:.1f} |"
    cosine = min(one["cosine"] for one in line["outputs"])
    error = max(one["error"] for one in line["outputs"])
    latency = ""
    if "ms" in line and "ms" in whole:
        latency = f"{line['ms']:.2f}, {line['ms'] / whole['ms']:.2f}"
    cells = (
        name,
        f"{row}{steps}",
        f"{line['score']:.2f}",
        f"{cosine:.4f}",
        f"{100 * error:.2f} %",
        f"{line['bytes'] / 1e6:.2f}",
        latency,
        f"{line['minutes']:.1f}",
    )
    return f"| {' | '.join(cells)} |"
