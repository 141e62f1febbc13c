"""SqueezeNet 1.1 (Iandola 2016) on Tiny-ImageNet: --recipe paper/lsq-w4a4."""

from __future__ import annotations

import torch
from paper_images import images
from torch import Tensor, nn
from torch.utils.data import Dataset


class Fire(nn.Module):
    """Squeeze by 1×1 convolutions, widen by 1×1 and 3×3 ones side by side."""

    def __init__(self, inputs: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat((torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))), dim=1)


class SqueezeNet(nn.Module):
    """No BatchNorm, no linear layer; images (N, 3, H, W) to logits (N, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Conv2d(512, classes, 1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


def model() -> nn.Module:
    """With random weights: give trained ones by --weights."""
    return SqueezeNet(classes=200)


def example_inputs() -> tuple[Tensor, ...]:
    return (torch.zeros(2, 3, 64, 64),)


def train_data() -> Dataset[Tensor] | Tensor:
    return images(64)
