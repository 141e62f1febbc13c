"""Accuracy of the example at W8A8, W4A4 and W2A2, from unlabelled images, over three seeds.

    python benchmarks/example.py [OUT]

Finished runs are kept in OUT (default: sqakd-out/benchmark-example) and not run again. Prints a table.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from sqakd_fx.pipeline import run
from sqakd_fx.recipe import resolve_recipe
from sqakd_fx.source import load_source

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion" / "model.py"
BITS = ("w8a8", "w4a4", "w2a2")
SEEDS = (0, 1, 2)


def report(bits: str, seed: int, out: Path) -> dict:
    """The report of one run, made where it is not there yet."""
    folder = out / f"{bits}-seed{seed}"
    path = folder / "report.json"
    if not path.exists():
        run(load_source(str(EXAMPLE)), resolve_recipe(bits, seed=seed), folder)
    return json.loads(path.read_text())


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "sqakd-out/benchmark-example")
    print(
        "| bits | float | ONNX, mean ± std | difference | same top-1 as the student | file | seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    for bits in BITS:
        reports = [report(bits, seed, out) for seed in SEEDS]
        float_accuracy = reports[0]["accuracy"]["float"]
        scores = [r["accuracy"]["onnx"] for r in reports]
        mean, spread = statistics.mean(scores), statistics.stdev(scores)
        full = [
            runtime["agreement"]
            for r in reports
            for runtime in r["validation"]["runtimes"]
            if runtime["optimisation"] == "full"
        ]
        seconds = statistics.mean(sum(r["seconds"].values()) for r in reports)
        print(
            f"| {bits} | {float_accuracy:.2f} | {mean:.2f} ± {spread:.2f} | "
            f"{mean - float_accuracy:+.2f} | {min(full):.2%} | "
            f"{reports[0]['onnx_bytes'] / 1024:.0f} KiB | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
