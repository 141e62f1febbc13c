"""VGG networks with BatchNorm (Simonyan 2015), with one linear layer behind a global average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class VGG(nn.Module):
    """Stages of 3×3 convolutions, each but the last ending in a 2×2 max-pool; images to logits."""

    def __init__(self, stages: Sequence[Sequence[int]], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for number, widths in enumerate(stages):
            if number:
                layers.append(nn.MaxPool2d(2))
            for outputs in widths:
                layers += [
                    nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))
