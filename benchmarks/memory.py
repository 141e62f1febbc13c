"""Bytes that a run holds for each parameter of a model, which says what size of student fits.

    python benchmarks/memory.py

Linear layers on small batches, so that activations count for little. Every row is a process of its own; the figure is
what is resident at most in training, above what the process held with the user's model in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

import sqakd_fx

WIDTHS = (1500, 3000)
ROWS = {
    "w4a4, adam": ("w4a4",),
    "w4a4, sgd": ("w4a4", "optimizer=sgd"),
    "w8a8, adam": ("w8a8",),
}
"""Preset and settings."""
_DEPTH = 6


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(_DEPTH) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10)).eval()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Watch(threading.Thread):
    """The most that is resident while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.running = 0, True

    def run(self) -> None:
        while self.running:
            self.most = max(self.most, resident())
            time.sleep(0.01)


def measure(width: int, preset: str, *settings: str) -> dict[str, float]:
    """Parameters, and bytes for each of them in three steps of training."""
    torch.set_num_threads(1)
    net = network(width)
    count = sum(parameter.numel() for parameter in net.parameters())
    x = torch.randn(64, width)
    fixed = {"steps": 3, "batch_size": 8, "calibration_batches": 1, "held_out": 0}
    recipe = sqakd_fx.resolve_recipe(preset, settings=settings, compile="never", **fixed)
    before = resident()
    program = sqakd_fx.build_program(net, x[:2], recipe)
    sqakd_fx.calibrate(program, x)
    watch = Watch()
    watch.start()
    sqakd_fx.distil(program, x)
    watch.running = False
    watch.join()
    return {"parameters": count, "bytes": (watch.most - before) / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--row", nargs="*", help="width, preset and settings of one process")
    asked = parser.parse_args().row
    if asked:
        print(json.dumps(measure(int(asked[0]), *asked[1:])))
        return
    print("| recipe | parameters | bytes for each |\n|---|---|---|")
    for name, settings in ROWS.items():
        for width in WIDTHS:
            command = [sys.executable, __file__, "--row", str(width), *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {name} | {found['parameters'] / 1e6:.1f} M | {found['bytes']:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
