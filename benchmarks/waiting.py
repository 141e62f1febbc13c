"""How torch's threads should wait for one another: spinning, or sleeping at once.

    python benchmarks/waiting.py

The processes of both policies take turns; each trains a small or a larger network on all cores and tells the wall time
of a step. Then the same beside busy processes. The figures are means, since a few steps that stall decide how long a
run takes. The machine's load before each row is printed: on a quiet machine it is near 0.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

ROUNDS = 3
STEPS = 100
POLICIES = {"passive": {"OMP_WAIT_POLICY": "passive"}, "unset": {}}
CHANNELS = (16, 64)
_BUSY = "while True: pass"


def step_ms(channels: int) -> float:
    """Mean milliseconds of a step of a network with so many channels on all cores."""
    import torch
    from torch import nn

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Flatten(), nn.Linear(channels * 256, 10),
    )  # fmt: skip
    images, optimizer = torch.randn(32, 3, 16, 16), torch.optim.Adam(net.parameters())
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.mean(times[STEPS // 5 :])


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Beside so many processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def in_turns(channels: int) -> dict[str, float]:
    """Milliseconds of a step by policy: the median of processes that take turns."""
    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    unset = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    for _ in range(ROUNDS):
        for name, variables in POLICIES.items():
            command = [sys.executable, __file__, "--step", str(channels)]
            done = subprocess.run(
                command, env=unset | variables, capture_output=True, text=True, check=True
            )
            found[name].append(float(done.stdout))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    if "--step" in sys.argv:
        print(step_ms(int(sys.argv[-1])))
        return
    cores = os.cpu_count() or 1
    print(
        "| channels | busy processes | load before | passive, ms a step | unset, ms a step | ratio |"
    )
    print("|---|---|---|---|---|---|")
    for channels in CHANNELS:
        for count in (0, cores):
            load = os.getloadavg()[0]
            with busy(count):
                ms = in_turns(channels)
            row = f"{ms['passive']:.1f} | {ms['unset']:.1f} | {ms['passive'] / ms['unset']:.2f}"
            print(f"| {channels} | {count} | {load:.1f} | {row} |", flush=True)


if __name__ == "__main__":
    main()
