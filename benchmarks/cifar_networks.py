"""Networks for 32×32 images of 10 classes, as papers on low bits have them. Plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from plain import MobileNetV2, ViTTiny
from resnet20 import ResNet20
from safetensors.torch import load_file
from torch import Tensor, nn


class VGGSmall(nn.Module):
    """Six 3×3 convolutions of 128, 256 and 512 channels and one linear layer (Zhang 2018, LQ-Nets)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in (128, 256, 512):
            for last in (False, True):
                layers += [
                    nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                    *([nn.MaxPool2d(2)] if last else []),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                ]
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(512 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.features(x), 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": ResNet20,
    "vgg_small": VGGSmall,
    "mobilenet_v2": partial(MobileNetV2, classes=10, strides=(1, 1), dropout=0.2),
    "deit_tiny": partial(ViTTiny, side=32, patch=4, classes=10),
}


def trained(name: str, weights: Path) -> nn.Module:
    """A network of these with weights from a file, in evaluation mode."""
    network = NETWORKS[name]()
    network.load_state_dict(load_file(weights))
    return network.eval()
