"""What makes a run repeat itself: seeds, and operations that give the same result every time."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def undisturbed_randomness() -> Iterator[None]:
    """Afterwards Python, numpy and torch go on as if nothing had been drawn inside."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(arrays)


@contextmanager
def repeatable_arithmetic(device: torch.device, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Inside, deterministic operations on a CPU, on a GPU where asked for, and TF32 there or not.

    Afterwards all is as before, but for cuBLAS, whose workspace is then a fixed one.

    Deterministic, torch also fills all new memory, which takes a twentieth of a training step: not here.
    """
    memory: Any = torch.utils.deterministic  # Any: type checkers do not see its attribute
    backends = torch.backends
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
    )
    torch.use_deterministic_algorithms(device.type == "cpu" or deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory.fill_uninitialized_memory = False
    if device.type == "cuda":
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before[3:]
