"""Training mode and evaluation mode of a student: which of its layers learn statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


def set_training(student: nn.Module, *, live_batch_norm: bool) -> None:
    """Training mode, in which BatchNorm takes statistics of batches where it is live; InstanceNorm never does.

    The teacher computes with running statistics. A normalization that is not to be absorbed behind a layer keeps them.
    """
    student.train()
    for module in student.modules():
        is_frozen = isinstance(module, _InstanceNorm) or not live_batch_norm
        if is_frozen and isinstance(module, _BatchNorm | _InstanceNorm):
            module.eval()


@contextmanager
def evaluation_mode(student: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode; each gets back the mode that it had."""
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
