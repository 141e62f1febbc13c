"""VGG-13 on CIFAR-100: --recipe paper/cifar100/ewgs-w2a2."""

from __future__ import annotations

import torch
from paper_images import images
from torch import Tensor, nn
from torch.utils.data import Dataset
from vgg import VGG


def model() -> nn.Module:
    """With random weights: give trained ones by --weights."""
    return VGG([[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2], classes=100)


def example_inputs() -> tuple[Tensor, ...]:
    return (torch.zeros(2, 3, 32, 32),)


def train_data() -> Dataset[Tensor] | Tensor:
    return images(32)
