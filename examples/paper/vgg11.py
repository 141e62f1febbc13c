"""VGG-11 on Tiny-ImageNet: --recipe paper/lsq-w4a4 --set batch_size=32."""

from __future__ import annotations

import torch
from paper_images import images
from torch import Tensor, nn
from torch.utils.data import Dataset
from vgg import VGG


def model() -> nn.Module:
    """With random weights: give trained ones by --weights."""
    return VGG([[64], [128], [256] * 2, [512] * 2, [512] * 2], classes=200)


def example_inputs() -> tuple[Tensor, ...]:
    return (torch.zeros(2, 3, 64, 64),)


def train_data() -> Dataset[Tensor] | Tensor:
    return images(64)
