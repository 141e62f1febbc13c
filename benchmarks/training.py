"""Step time and peak memory of training: float distillation, ours, and other tools.

    python benchmarks/training.py [NETWORK_GLOB ...] [--rows ROW_GLOB ...] [--seconds S]
    python benchmarks/training.py --scaling bits layers batch

A step is the teacher's forward pass, the student's forward and backward pass, and Adam's update, on a fixed
batch. Every row is a process of its own; they take turns, one step each, so that what slows the machine down
slows them all. Medians and ratios to the eager float step are shown. Peak memory is the most that was
resident during the steps above what the process held before there was a network (on a GPU: the most that was
taken from it). Each of the other tools runs in a virtual environment that is made when it is first needed.
--scaling times ours against the float step over bits, layers and batch sizes instead.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chosen import chosen
from peers.client import Worker, WorkerFailed
from peers.environment import default_folder
from plain import NETWORKS

WARM_UP = 3
LEAST_ROUNDS = 5
REFERENCE = "float eager"
GRAPHED = "float compiled, CUDA graphs"


def _own(bits: int, compile: bool, precision: str = "float32") -> tuple[str, dict[str, Any]]:
    return "own", {"bits": bits, "compile": compile, "precision": precision}


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("float", {"compile": False}),
    "float compiled": ("float", {"compile": True}),
    GRAPHED: ("float", {"compile": True, "mode": "reduce-overhead"}),
    "ours w4a4 eager": _own(4, False),
    "ours w4a4 compiled": _own(4, True),
    "ours w4a4 compiled bf16": _own(4, True, "bf16"),
    "ours w8a8 compiled": _own(8, True),
    "modelopt w8a8": ("modelopt", {"bits": 8}),
    "torchao w8a8": ("torchao", {"bits": 8}),
    "nncf w8a8": ("nncf", {"bits": 8}),
    "brevitas w8a8": ("brevitas", {"bits": 8}),
    "brevitas w4a4": ("brevitas", {"bits": 4}),
    "brevitas w2a2": ("brevitas", {"bits": 2}),
}


@dataclass(frozen=True)
class Measured:
    """One row: median seconds of a step, peak bytes, seconds of the first steps, GPU kernels a step."""

    step: float
    peak: int
    first: float
    kernels: int | None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Setting:
    """How workers are run: seconds of steps for each, how many start at once, where environments are."""

    seconds: float
    at_once: int
    folder: Path


@contextlib.contextmanager
def workers(
    rows: dict[str, tuple[str, dict[str, Any]]], network: str, batch: int, setting: Setting
) -> Iterator[tuple[dict[str, Worker], dict[str, float], dict[str, str]]]:
    """Running workers by row, the seconds of their first steps, and what failed and why."""
    running: dict[str, Worker] = {}
    first: dict[str, float] = {}
    failed: dict[str, str] = {}

    def start(name: str) -> None:
        say(f"{network}: first steps of {name}")
        adapter, options = rows[name]
        setup = {"do": "time", "network": network, "batch": batch, "warm_up": WARM_UP, **options}
        try:
            running[name] = Worker(adapter, setting.folder, f"{network} {name}", setup)
            first[name] = running[name].receive()["seconds"]
        except (WorkerFailed, RuntimeError) as error:
            failed[name] = str(error)

    try:
        with ThreadPoolExecutor(setting.at_once) as pool:
            list(pool.map(start, rows))
        for name in failed:
            if name in running:
                running.pop(name).close()
        yield {name: running[name] for name in rows if name in running}, first, failed
    finally:
        for worker in running.values():
            worker.close()


def measure(
    rows: dict[str, tuple[str, dict[str, Any]]],
    network: str,
    batch: int,
    setting: Setting,
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every row's figures, and what failed and why."""
    with workers(rows, network, batch, setting) as (running, first, failed):
        times: dict[str, list[float]] = {name: [] for name in running}
        end, said, rounds = time.monotonic() + setting.seconds * len(running), 0.0, 0
        while running and (rounds < LEAST_ROUNDS or time.monotonic() < end):
            for name, worker in running.items():
                times[name].append(worker.ask("step")["seconds"])
            rounds += 1
            if time.monotonic() - said > 5:
                said = time.monotonic()
                say(f"{network}: {rounds} rounds, {max(end - said, 0):.0f} s left")
        found = {
            name: Measured(
                statistics.median(times[name]),
                worker.ask("memory")["bytes"],
                first[name],
                worker.ask("kernels")["kernels"] if torch.cuda.is_available() else None,
            )
            for name, worker in running.items()
        }
    return found, failed


def table(title: str, found: dict[str, Measured], failed: dict[str, str]) -> str:
    """A Markdown table with ratios to the eager float step."""
    on_gpu = torch.cuda.is_available()
    base = found[REFERENCE]
    lines = [
        f"### {title}\n",
        "| row | ms a step | ÷ float eager | peak MB | ÷ float eager | first steps, s |"
        + (" kernels |" if on_gpu else ""),
        "|---|---|---|---|---|---|" + ("---|" if on_gpu else ""),
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {1000 * row.step:.1f} | {row.step / base.step:.2f} | {row.peak / 1e6:.0f} "
            f"| {row.peak / base.peak:.2f} | {row.first:.0f} |"
            + (f" {row.kernels} |" if on_gpu else "")
        )
    lines += [f"| {name} | failed: {why} |" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


def scaling(over: str, setting: Setting) -> Iterator[str]:
    """Lines of a table: ours, compiled, against the eager float step, over bits, layers or batch."""
    pair = {REFERENCE: ROWS[REFERENCE], "ours w4a4 compiled": ROWS["ours w4a4 compiled"]}
    by_bits = {f"ours w{b}a{b} compiled": _own(b, True) for b in (8, 4, 2, 1)}
    cases = {
        "bits": [("resnet20", 128, {REFERENCE: ROWS[REFERENCE], **by_bits})],
        "layers": [(name, 128, pair) for name in ("resnet8", "resnet14", "resnet20", "resnet32")],
        "batch": [("resnet20", batch, pair) for batch in (32, 64, 128, 256)],
    }
    yield "| network | batch | bits | float eager, ms | ours compiled, ms | ratio |"
    yield "|---|---|---|---|---|---|"
    for network, batch, rows in cases[over]:
        found, failed = measure(rows, network, batch, setting)
        base = found.pop(REFERENCE)
        for name, row in found.items():
            yield (
                f"| {network} | {batch} | {name.split()[1]} | {1000 * base.step:.1f} "
                f"| {1000 * row.step:.1f} | {row.step / base.step:.2f} |"
            )
        yield from (f"| {network} | {batch} | {n}: failed: {why} |" for n, why in failed.items())


def machine() -> str:
    """The hardware and the version of torch, in a line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cores} CPU cores ({platform.machine()}, {capability}), torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "globs", nargs="*", default=["resnet20", "resnet18", "mobile*", "vit*", "minilm"]
    )
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs of rows")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each row")
    parser.add_argument("--batch", type=int, help="in place of each network's own")
    parser.add_argument("--scaling", nargs="+", choices=("bits", "layers", "batch"))
    parser.add_argument("--environments", type=Path, default=default_folder())
    parser.add_argument(
        "--at-once", type=int, default=1, help="workers that take their first steps together"
    )
    options = parser.parse_args()
    setting = Setting(options.seconds, options.at_once, options.environments)
    print(machine() + "\n")
    for over in options.scaling or ():
        print(f"### Scaling over {over}\n")
        for line in scaling(over, setting):
            print(line, flush=True)
        print()
    if options.scaling:
        return
    asked = {REFERENCE, *chosen(ROWS, options.rows)}
    rows = {
        name: row
        for name, row in ROWS.items()
        if name in asked and (name != GRAPHED or torch.cuda.is_available())
    }
    for name in chosen(NETWORKS, options.globs):
        network = NETWORKS[name]
        batch = options.batch or network.batch
        size = "×".join(str(n) for n in network.shape[-2:])
        found, failed = measure(rows, name, batch, setting)
        print(table(f"{name}, {size}, batch {batch}", found, failed), flush=True)


if __name__ == "__main__":
    main()
