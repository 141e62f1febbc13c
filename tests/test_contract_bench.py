"""The bench of exactness takes its networks from these tests."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from contract import networks


def test_the_contract_finds_the_networks_of_the_tests_and_of_the_paper() -> None:
    found = networks(2)
    assert {"residual", "attention", "einsums", "paper/resnet20", "random/1"} <= found.keys()
    for name in ("attention", "einsums", "random/1"):
        model, args, kwargs = found[name]()
        with torch.no_grad():
            model(*args, **kwargs)
