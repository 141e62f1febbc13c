"""Accuracy of the example by preset, from unlabelled images, over three seeds.

    python benchmarks/example.py [OUT] [--seeds 3] [--presets w8a8 w4a4 w2a2]
    python benchmarks/example.py --presets speed size accuracy    # what --for chooses

Finished runs are kept in OUT (default: sqakd-out/benchmark-example) and not run again. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from sqakd_fx.pipeline import run
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.source import load_source

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion" / "model.py"
PRESETS = ("w8a8", "w4a4", "w2a2")


def report(bits: str, seed: int, out: Path) -> dict:
    """The report of one run, made where it is not there yet."""
    folder = out / f"{bits}-seed{seed}"
    path = folder / "report.json"
    if not path.exists():
        run(load_source(str(EXAMPLE)), resolve_recipe(bits, seed=seed), folder)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default="sqakd-out/benchmark-example")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    options = parser.parse_args()
    print(
        "| preset | float | ONNX, mean ± std | difference | same top-1 as the student | file | seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    for bits in options.presets:
        reports = [report(bits, seed, options.out) for seed in range(options.seeds)]
        float_accuracy = reports[0]["accuracy"]["float"]
        scores = [r["accuracy"]["onnx"] for r in reports]
        mean = statistics.mean(scores)
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        full = [
            runtime["agreement"]
            for r in reports
            for runtime in r["validation"]["runtimes"]
            if runtime["optimization"] == "full"
        ]
        seconds = statistics.mean(sum(r["seconds"].values()) for r in reports)
        print(
            f"| {bits} | {float_accuracy:.2f} | {mean:.2f}{spread} | "
            f"{mean - float_accuracy:+.2f} | {min(full):.2%} | "
            f"{reports[0]['onnx_bytes'] / 1024:.0f} KiB | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
