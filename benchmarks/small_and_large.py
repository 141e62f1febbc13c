"""Networks of the tests, and four of usual sizes, with random weights: what the benches of other runtimes try."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from plain import NETWORKS as LARGE
from plain import settled
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from default_sessions import NETWORKS as SMALL

NAMES = (*SMALL, "resnet18", "mobilenet_v2", "vit_tiny", "minilm")


def network(name: str, samples: int = 1) -> tuple[nn.Module, tuple[Any, ...]]:
    """A network in evaluation mode and its inputs; those of usual size have so many samples."""
    torch.manual_seed(0)
    if name in SMALL:
        model, inputs = SMALL[name]()
        return model.eval(), inputs
    return settled(name, LARGE[name].inputs(8)), (LARGE[name].inputs(samples),)
