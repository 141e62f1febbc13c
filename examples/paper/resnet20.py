"""ResNet-20 on CIFAR-10: --recipe paper/ewgs-w2a2."""

from __future__ import annotations

import torch
from paper_images import images
from small_resnet import SmallResNet
from torch import Tensor, nn
from torch.utils.data import Dataset


def model() -> nn.Module:
    """With random weights: give trained ones by --weights."""
    return SmallResNet(blocks=3, classes=10)


def example_inputs() -> tuple[Tensor, ...]:
    return (torch.zeros(2, 3, 32, 32),)


def train_data() -> Dataset[Tensor] | Tensor:
    return images(32)
