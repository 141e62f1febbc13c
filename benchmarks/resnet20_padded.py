"""ResNet-20 for CIFAR-10 as its paper has it (He 2015, option A), with the weights of a public repository.

Shortcuts take every second pixel and have channels of zeros added. The weights are those that
github.com/akamaster/pytorch_resnet_cifar10 publishes: 91.73 % of the 10,000 test images.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PADDED_WEIGHTS = Path(
    os.environ.get("SQAKD_FX_RESNETS", "nowhere"), "pretrained_models", "resnet20-12fca82f.th"
)


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.added = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(y + x)


class PaddedResNet20(nn.Module):
    """Widths 16, 32, 64 with three blocks each; images (N, 3, 32, 32) to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def padded_resnet20() -> nn.Module:
    """In evaluation mode."""
    saved = torch.load(PADDED_WEIGHTS, map_location="cpu", weights_only=True)["state_dict"]
    model = PaddedResNet20()
    model.load_state_dict({name.removeprefix("module."): x for name, x in saved.items()})
    return model.eval()
