"""Networks in plain PyTorch, for processes that have nothing else: what `training.py` times."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from resnet20 import Block, resnet20
from torch import Tensor, nn
from torch.nn import functional as F


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for 32×32 images: n blocks of each width; n = 3 is ResNet-20."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        widths = [16, *(width for width in (16, 32, 64) for _ in range(n))]
        self.layers = nn.Sequential(
            *(Block(i, o, 1 if i == o else 2) for i, o in itertools.pairwise(widths))
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.stem(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ResNet18(nn.Module):
    """He et al. 2016; images (N, 3, 224, 224) to logits (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(64)
        widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
        self.layers = nn.Sequential(
            *(Block(i, o, 1 if i == o else 2) for i, o in itertools.pairwise(widths))
        )
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 3, 2, 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1))


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Expand by 1×1, filter each channel by 3×3, project by 1×1."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers = [*_conv_norm(inputs, hidden, 1, 1, 1), nn.ReLU6()] if expand != 1 else []
        layers += [*_conv_norm(hidden, hidden, 3, stride, hidden), nn.ReLU6()]
        self.body = nn.Sequential(*layers, *_conv_norm(hidden, outputs, 1, 1, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018; images (N, 3, 224, 224) to logits (N, 1000).

    `strides` are those of the first two layers that shrink the image, for smaller images.
    """

    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, None),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    """Expansion, width, blocks, stride of the first block; None for the second of `strides`."""

    def __init__(
        self, classes: int = 1000, strides: tuple[int, int] = (2, 2), dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers = [*_conv_norm(3, 32, 3, strides[0], 1), nn.ReLU6()]
        inputs = 32
        for expand, width, blocks, first in self.STAGES:
            stride = strides[1] if first is None else first
            for index in range(blocks):
                layers.append(InvertedResidual(inputs, width, 1 if index else stride, expand))
                inputs = width
        layers += [*_conv_norm(320, 1280, 1, 1, 1), nn.ReLU6()]
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1)
        return self.fc(self.dropout(x))


VOCABULARY = 30522
"""Rows of BERT's uncased table of words."""


class Attention(nn.Module):
    """Multi-head self-attention on (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViTTiny(nn.Module):
    """12 layers of width 192 on patches; images (N, 3, side, side) to logits (N, classes)."""

    def __init__(
        self,
        width: int = 192,
        layers: int = 12,
        heads: int = 3,
        *,
        side: int = 224,
        patch: int = 16,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, width))
        places = (side // patch) ** 2 + 1
        self.positions = nn.Parameter(0.02 * torch.randn(1, places, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


class SentenceEncoder(nn.Module):
    """MiniLM-L6: 6 post-norm layers of width 384; token ids (N, T) to mean embeddings (N, 384) of length one."""

    def __init__(self, width: int = 384, layers: int = 6, heads: int = 12) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(places))
        for i, (attention, up, down) in enumerate(
            zip(self.attention, self.up, self.down, strict=True)
        ):
            x = self.norms[2 * i](x + attention(x))
            x = self.norms[2 * i + 1](x + down(F.gelu(up(x))))
        return F.normalize(x.mean(1), dim=-1)


@dataclass(frozen=True)
class Timed:
    """A network to time: how to make it, the shape of one input, the batch of a step, and what inputs hold."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    holds_tokens: bool = False

    def inputs(self, samples: int) -> Tensor:
        """Random images in float32, or token ids in int64."""
        if self.holds_tokens:
            return torch.randint(VOCABULARY, (samples, *self.shape))
        return torch.randn(samples, *self.shape)


NETWORKS = {
    "resnet20": Timed(resnet20, (3, 32, 32), 128),
    "resnet18": Timed(ResNet18, (3, 224, 224), 8),
    "mobilenet_v2": Timed(MobileNetV2, (3, 224, 224), 8),
    "vit_tiny": Timed(ViTTiny, (3, 224, 224), 8),
    "minilm": Timed(SentenceEncoder, (128,), 16, holds_tokens=True),
    "resnet8": Timed(lambda: CifarResNet(1), (3, 32, 32), 128),
    "resnet14": Timed(lambda: CifarResNet(2), (3, 32, 32), 128),
    "resnet32": Timed(lambda: CifarResNet(5), (3, 32, 32), 128),
}


def settled(name: str, images: Tensor) -> nn.Module:
    """The network in evaluation mode; BatchNorm of random weights has seen the images once."""
    torch.manual_seed(0)
    model = NETWORKS[name].make()
    if name != "resnet20":
        model.train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model(images)
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()
