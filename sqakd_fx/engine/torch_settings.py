"""Settings of torch that hold for a whole process, which the user's code may have changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CPU = torch.device("cpu")


@contextmanager
def plain_settings() -> Iterator[None]:
    """Inside, torch begins with gradients, float32 and the CPU; behind it, its settings are those in front of it.

    Scripts for inference turn gradients off at their top, and a model file is such a script.
    """
    gradients = torch.is_grad_enabled()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    _set(True, torch.float32, _CPU)
    try:
        yield
    finally:
        _set(gradients, dtype, device)


def _set(gradients: bool, dtype: torch.dtype, device: torch.device) -> None:
    torch.set_grad_enabled(gradients)
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        torch.set_default_device(None if device == _CPU else device)
