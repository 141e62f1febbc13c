"""MobileNetV2 (Sandler 2018) on Tiny-ImageNet: --recipe paper/pact-w4a4."""

from __future__ import annotations

import torch
from paper_images import images
from torch import Tensor, nn
from torch.utils.data import Dataset


def convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int) -> None:
        super().__init__()
        hidden = inputs * widen
        layers: list[nn.Module] = [convolution(inputs, hidden, 1, 1, 1)] if widen != 1 else []
        layers += [
            convolution(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


STAGES = (  # widening, channels, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """Images (N, 3, H, W) to logits (N, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(3, 32, 3, 2, 1)]
        inputs = 32
        for widen, outputs, blocks, stride in STAGES:
            for index in range(blocks):
                layers.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, widen))
                inputs = outputs
        layers.append(convolution(inputs, 1280, 1, 1, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def model() -> nn.Module:
    """With random weights: give trained ones by --weights."""
    return MobileNetV2(classes=200)


def example_inputs() -> tuple[Tensor, ...]:
    return (torch.zeros(2, 3, 64, 64),)


def train_data() -> Dataset[Tensor] | Tensor:
    return images(64)
