"""One step of label-free distillation, for whatever can be trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE = 4.0
WARM_UP = 0.05


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL at temperature 4, as our own runs minimize; logits (N, C) to a scalar."""
    return TEMPERATURE**2 * F.kl_div(
        F.log_softmax(student.float() / TEMPERATURE, 1),
        F.log_softmax(teacher.float() / TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )


def take_step(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor
) -> Tensor:
    """Teacher's forward, student's forward and backward, update; returns the loss, detached."""
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        target = teacher(images)
    loss = distillation_loss(student(images), target)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def rate_factor(step: int, total: int) -> float:
    """Share of the learning rate: linear warm-up, then cosine to 0, as our presets have it."""
    warm = int(WARM_UP * total)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(total - warm, 1), 1.0)))
