"""ShuffleNetV2 (Ma 2018), width 1, on Tiny-ImageNet: --recipe paper/pact-w4a4."""

from __future__ import annotations

import torch
from paper_images import images
from torch import Tensor, nn
from torch.utils.data import Dataset


def pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    ]


def shuffled(x: Tensor) -> Tensor:
    """The channels of two halves, taken in turns."""
    n, channels, height, width = x.shape
    halves = x.reshape(n, 2, channels // 2, height, width)
    return halves.transpose(1, 2).reshape(n, channels, height, width)


class Unit(nn.Module):
    """One half of the channels passes through three convolutions, the other stays as it is.

    Where it strides, both halves see the whole input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.strides = stride != 1
        self.branch1 = nn.Sequential(*depthwise(inputs, stride), *pointwise(inputs, half))
        if not self.strides:
            self.branch1 = nn.Sequential()
        self.branch2 = nn.Sequential(
            *pointwise(inputs if self.strides else half, half),
            *depthwise(half, stride),
            *pointwise(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.strides else x.chunk(2, dim=1)
        return shuffled(torch.cat((self.branch1(left), self.branch2(right)), dim=1))


class ShuffleNetV2(nn.Module):
    """Images (N, 3, H, W) to logits (N, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True)
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        units, inputs = [], 24
        for outputs, count in ((116, 4), (232, 8), (464, 4)):
            for index in range(count):
                units.append(Unit(inputs, outputs, 2 if index == 0 else 1))
                inputs = outputs
        self.stages = nn.Sequential(*units)
        self.conv5 = nn.Sequential(*pointwise(inputs, 1024))
        self.fc = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stages(self.maxpool(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def model() -> nn.Module:
    """With random weights: give trained ones by --weights."""
    return ShuffleNetV2(classes=200)


def example_inputs() -> tuple[Tensor, ...]:
    return (torch.zeros(2, 3, 64, 64),)


def train_data() -> Dataset[Tensor] | Tensor:
    return images(64)
