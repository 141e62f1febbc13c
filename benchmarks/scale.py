"""Seconds that tracing, every pass and inspection take on networks of 100 to 10,000 nodes.

    python benchmarks/scale.py [NODES ...]

Seconds of one core, whatever else the machine does. The networks are chains of small residual, concatenating and
attention-like blocks, so that every pass has work at every node. The last column is the time for a node, which stays
level where everything is linear.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from sqakd_fx.cli.inspect import rows
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.fold_batch_norm import FoldBatchNorm
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe

WIDTH = 4


class Residual(nn.Module):
    """conv, BatchNorm, ReLU, conv, sum, ReLU: 6 nodes of the traced graph, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.second = nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(x + self.second(torch.cat([x, y], dim=1)))


def network(nodes: int) -> nn.Module:
    """A chain of blocks that traces to about `nodes` nodes (weights and biases included)."""
    blocks = [Residual() for _ in range(max(nodes // 10, 1))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 4))


def measure(nodes: int) -> dict[str, float]:
    """Seconds of each stage, and the number of nodes that were traced."""
    torch.manual_seed(0)
    model, example = network(nodes).eval(), torch.randn(2, WIDTH, 4, 4)
    found: dict[str, float] = {}
    started = time.process_time()
    program = build_program(model, example, resolve_recipe("w8a8"))
    whole = time.process_time() - started
    for entry in program.log:
        found[entry.name] = found.get(entry.name, 0.0) + entry.seconds
    found["trace and checks"] = whole - sum(found.values())
    started = time.process_time()
    run_passes(program.teacher, [FoldBatchNorm()])
    found["fold_batch_norm"] = time.process_time() - started
    calibrate(program.student, [(example,)], method="minmax")
    started = time.process_time()
    lower(program.student)
    found["lower_to_integer"] = time.process_time() - started
    started = time.process_time()
    rows(program.student)
    found["inspect"] = time.process_time() - started
    return found | {"nodes": len(program.teacher.graph.nodes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nodes", nargs="*", type=int, default=[100, 1_000, 10_000])
    torch.set_num_threads(1)
    measure(100)
    columns = {size: measure(size) for size in parser.parse_args().nodes}
    names = [name for name in next(iter(columns.values())) if name != "nodes"]
    print("| stage | " + " | ".join(f"{int(c['nodes']):,} nodes" for c in columns.values()) + " |")
    print("|---|" + "---|" * len(columns))
    for name in names:
        print(f"| {name} | " + " | ".join(f"{c[name]:.2f} s" for c in columns.values()) + " |")
    totals = {size: sum(c[name] for name in names) for size, c in columns.items()}
    print("| **all** | " + " | ".join(f"{t:.2f} s" for t in totals.values()) + " |")
    each = [1e6 * totals[size] / columns[size]["nodes"] for size in columns]
    print("| µs a node | " + " | ".join(f"{t:.0f}" for t in each) + " |")


if __name__ == "__main__":
    main()
