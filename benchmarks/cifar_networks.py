"""Networks for 32×32 images of 10 classes, as papers on low bits have them. Plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from plain import InvertedResidual, Layer
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


class SmallMobileNetV2(nn.Module):
    """MobileNetV2 (Sandler 2018) with the first two strides of 1 in place of 2."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU6(),
        ]
        inputs = 32
        for expand, outputs, blocks, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for index in range(blocks):
                layers.append(
                    InvertedResidual(inputs, outputs, stride if index == 0 else 1, expand)
                )
                inputs = outputs
        layers += [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class DeiTTiny(nn.Module):
    """Twelve transformer layers of width 192 over patches of 4×4 (Touvron 2021; there of 16×16)."""

    def __init__(self, width: int = 192, layers: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layers(x)[:, 0]))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": ResNet20,
    "vgg_small": VGGSmall,
    "mobilenet_v2": SmallMobileNetV2,
    "deit_tiny": DeiTTiny,
}


def trained(name: str, weights: Path) -> nn.Module:
    """A network of these with weights from a file, in evaluation mode."""
    network = NETWORKS[name]()
    network.load_state_dict(load_file(weights))
    return network.eval()
