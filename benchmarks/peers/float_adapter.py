"""The reference: the float network distilled from itself, eager or compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from distillation import take_step
from torch import Tensor, nn


def train(
    setup: Mapping[str, Any], model: nn.Module, images: Tensor, batches: Iterator[Tensor]
) -> None:
    """A step for each batch."""
    student = copy.deepcopy(model).train()
    if setup["compile"]:
        for net in (student, model):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            net.compile(mode=setup.get("mode"))
    optimizer = torch.optim.Adam(student.parameters(), 1e-4, fused=True)
    for batch in batches:
        torch.compiler.cudagraph_mark_step_begin()
        if setup["compile"] and batch.ndim == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        take_step(student, model, optimizer, batch)
