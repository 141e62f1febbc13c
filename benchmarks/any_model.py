"""Every network of `networks.py` through the whole pipeline at W8A8: a table.

    python benchmarks/any_model.py [GLOB ...] [--out FOLDER] [--table FILE]

Each network runs in a process of its own; finished rows are kept in FOLDER and not run again, failed ones
are. The
packages that the networks come from are looked for, and a network whose package is absent is left
out with a word. Columns: the front end; the share of multiply-accumulates in quantized layers (of
those that torch's own counter sees in the float model); what stays whole in float and why; the traced
graph against the float model; the export against the integer program at every quantized tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from chosen import chosen
from networks import NETWORKS
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from sqakd_fx.ir.outputs import largest_difference, tensors_of
from sqakd_fx.program import build_program, lower, multiply_accumulates
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.validation.validate import validate

SECONDS = 900
_IN_FLOAT = (
    r"(\w+) is computed in float",
    r"no input of this (\w+)",
    r"in float: (\w+) with a plain number",
    "residual stream",
    "scores of a softmax",
    r"an (average|affine) over",
    "cache",
)
"""What notes say of operations in float; the group, or the whole match, is what the table calls it."""
RECURRENT = ("gru", "lstm", "rnn")
PRODUCTS = ("Conv)", "ConvTranspose)", "Gemm)", "MatMul)")


def settle(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """Random weights with BatchNorm statistics of the example, so that activations have a size."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model(*args, **kwargs)
    return model.eval()


def float_macs(teacher: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Multiply-accumulates of one call of the traced float graph, counted by torch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        teacher(*inputs)
    return counter.get_total_flops() // 2


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    started = time.perf_counter()
    torch.manual_seed(0)
    model, args, kwargs = NETWORKS[name]()
    model = settle(model, args, kwargs)
    with torch.no_grad():
        wanted = tensors_of(_plain(copy.deepcopy(model)(*args, **kwargs)))
    recipe = resolve_recipe("w8a8")
    program = build_program(model, args, recipe, example_kwargs=kwargs)
    example = program.traced.call.flatten(args, kwargs)
    total = float_macs(program.teacher, example)
    with torch.no_grad():
        traced = largest_difference(wanted, tensors_of(program.teacher(*example)))
    calibrate(program.student, [example], method="minmax")
    lowered = lower(program.student).graph_module
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(program, lowered, path)
        checked = validate(program.student, lowered, path, [example])
    full = next(r for r in checked.runtimes if r.optimization == "full")
    off = next(r for r in checked.runtimes if r.optimization == "off")
    return {
        "name": name,
        "front_end": program.traced.front_end,
        "macs": total,
        "quantized": multiply_accumulates(program.student) / max(total, 1),
        "float_modules": [f"{i.path}: {i.reason}" for i in program.traced.float_modules]
        + [f"{n.node}: {n.reason}" for n in program.notes if n.reason.startswith(RECURRENT)]
        + [
            f"{Path(line).name} branches on data: the example's branch is kept"
            for line in program.traced.decisions
        ],
        "float": [f"{n.node}: {n.reason}" for n in program.notes],
        "traced_difference": traced,
        "tensors": len(full.tensors),
        "largest_full": max((t.largest for t in full.tensors), default=0),
        "largest_off": max((t.largest for t in off.tensors), default=0),
        "worst_share": max((t.share_above(0) for t in full.tensors), default=0.0),
        "above_one": sum(t.share_above(1) * t.elements for t in full.tensors),
        "float_heavy": [n for n in checked.fusion.float_heavy if n.endswith(PRODUCTS)],
        "integer": checked.fusion.integer,
        "failures": list(checked.failures),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _plain(output: Any) -> Any:
    return tree_map(lambda x: x, output)


def run_row(name: str, folder: Path) -> dict[str, Any]:
    """The kept row of a run that came through, or a fresh one from a process of its own."""
    path = folder / f"{name.replace('/', '-')}.json"
    if path.exists() and "error" in json.loads(path.read_text()):
        path.unlink()
    if not path.exists():
        command = [sys.executable, "-W", "ignore", __file__, "--only", name, "--into", str(path)]
        try:
            done = subprocess.run(
                command, timeout=SECONDS, capture_output=True, text=True, check=False
            )
            error = done.stderr.strip()
        except subprocess.TimeoutExpired:
            error = f"took over {SECONDS} s"
        if not path.exists():
            last = error.splitlines()[-1] if error else "the process died"
            path.write_text(json.dumps({"name": name, "error": last, "traceback": error}))
    row: dict[str, Any] = json.loads(path.read_text())
    return row


def in_float(notes: list[str]) -> str:
    """What stays in float between quantized tensors: operations and how often, the most frequent first."""
    counts: Counter[str] = Counter()
    for note in notes:
        reason = note.partition(": ")[2]
        found = [m for pattern in _IN_FLOAT if (m := re.search(pattern, reason))]
        counts[next(iter(found[0].groups()), found[0][0]) if found else "other"] += 1
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "–"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| network | front end | MACs quantized | float modules | traced − eager | tensors | "
        "ORT full: most steps off | share off | ORT unoptimized | products in float | stays in float |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} | | | | | | | | | |")
            continue
        float_modules = "; ".join(row["float_modules"]) or "–"
        lines.append(
            f"| {row['name']} | {row['front_end']} | {row['quantized']:.1%} | {float_modules} | "
            f"{row['traced_difference']:.0e} | {row['tensors']} | {row['largest_full']} | "
            f"{row['worst_share']:.2%} | {row['largest_off']} | {len(row['float_heavy'])} | "
            f"{in_float(row['float'])} |"
        )
    return "\n".join(lines) + "\n"


HEADER = """# Networks

Every network below goes through the whole pipeline at W8A8 by

    python benchmarks/any_model.py --table docs/networks.md

with {versions}. Weights are random (BatchNorm statistics from
the example), because what is measured is whether the compiler gives up and whether its output is exact.

- **MACs quantized**: share of multiply-accumulates in quantized layers, of those that torch counts in the
  float model.
- **float modules**: what stays whole in float, and why.
- **traced - eager**: largest relative difference of the outputs.
- **ORT full**: ONNX Runtime at full optimization against the integer program, over all quantized tensors. Two figures:
  the most steps that any code is off, and the largest share of codes of one tensor that are off at all.
- **ORT unoptimized**: the most steps off there.
- **products in float**: convolutions, linear layers and products that the optimized graph runs in float.
- **stays in float**: operations between quantized tensors that are computed in float, and how many of each;
  `sqakd-fx inspect` gives the reason of each one.

"""


def versions() -> str:
    """Of what the networks come from and run on."""
    names = ("torch", "onnxruntime-gpu", "onnxruntime", "torchvision", "timm", "transformers")
    found = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("globs", nargs="*", default=["*"])
    parser.add_argument("--out", type=Path, default=Path("sqakd-out/any-model"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    if options.only:
        try:
            row = measure(options.only)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
        options.into.write_text(json.dumps(row))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in chosen(NETWORKS, options.globs):
        rows.append(run_row(name, options.out))
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    if options.table:
        options.table.write_text(HEADER.format(versions=versions()) + markdown(rows))


if __name__ == "__main__":
    main()
