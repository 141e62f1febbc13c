"""Memory that one step has freed serves the next, and goes back after training."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from torch import nn
from sqakd_fx.engine.kept_memory import give_back_memory, kept_memory

layers = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 1), nn.ReLU())]
net, images = nn.Sequential(*layers), torch.randn(8, 8, 256, 256)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    net(images).square().mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def faults_of_a_step():
    return min(faults() for _ in range(6))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

given_back = faults_of_a_step()
with kept_memory():
    kept = faults_of_a_step()
    held = resident()
    give_back_memory()
    asked = held - resident()
    faults_of_a_step()
    held = resident()
print(given_back, kept, asked, held - resident())
"""

ALL_LARGE_BLOCKS_GO_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Without it glibc keeps a step's memory where a small block happens to lie behind it."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_stays_between_steps_and_goes_back_after_training() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env=os.environ | ALL_LARGE_BLOCKS_GO_BACK,
    )
    given_back, kept, freed_when_asked, freed = (int(x) for x in done.stdout.split())
    assert given_back > 100
    assert kept < given_back / 3
    assert freed_when_asked > 2**25
    assert freed > 2**25
