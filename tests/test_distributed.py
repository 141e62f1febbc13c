"""Two processes are one: the same losses as a single process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = """
import torch
from torch import nn
torch.set_num_threads(1)
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5),
    )
def example_inputs(): return torch.zeros(2, 1, 8, 8)
def train_data():
    return torch.randn(95, 1, 8, 8, generator=torch.Generator().manual_seed(1))
"""
SETTINGS = [
    "--steps",
    "12",
    "--set",
    "checkpoint_steps=1",
    "--set",
    "batch_size=32",
    "--set",
    "held_out=0",
]


def losses(folder: Path, launcher: list[str], *more: str) -> list[float]:
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "-m",
            "sqakd_fx",
            "quantize",
            "model.py",
            "--out",
            "out",
            *SETTINGS,
            *more,
        ],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("result: ") == 1
    return [
        json.loads(line)["loss"]
        for line in (folder / "out" / "train.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("family", ["lsq", "ewgs"])
def test_two_processes_have_the_losses_of_one(tmp_path: Path, family: str) -> None:
    # at 8 bits a value that float addition puts on the other side of a rounding changes little
    families = [
        "--bits",
        "w8a8",
        "--set",
        f"weight_family={family}",
        "--set",
        f"activation_family={family}",
    ]
    one = losses(tmp_path / "one", [], *families)
    two = losses(
        tmp_path / "two",
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        *families,
    )
    assert len(one) == len(two) == 12
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
