"""A voice encoder: three LSTM layers over mel spectrograms, one embedding for each 1.6 seconds."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from inputs import SPEECH, batches, package_file, voices
from numpy.typing import NDArray
from torch import Tensor, nn

FAMILY = "LSTM"
WEIGHTS = ("resemblyzer==0.1.4",)
LIBRARIES = ("scipy",)
INPUTS = f"{SPEECH}; 4 speakers, 40 recordings each"
SCORE = "speaker verification, 100 less equal error rate (%)"
FRAMES = 160


class VoiceEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        raw = torch.relu(self.linear(hidden[-1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


def model() -> nn.Module:
    network = VoiceEncoder()
    saved = torch.load(
        package_file("resemblyzer", "pretrained.pt"), map_location="cpu", weights_only=True
    )
    known = network.state_dict()
    network.load_state_dict({name: saved["model_state"][name] for name in known})
    return network.eval()


@cache
def spectrograms() -> tuple[Tensor, Tensor]:
    """(N, frames, mels) of all recordings and the number of each one's speaker, mixed."""
    made, speakers = [], []
    for number, recordings in enumerate(voices(16_000, 2.5, 40).values()):
        for one in recordings:
            loud = one * (10 ** (-30 / 20) / np.sqrt(np.mean(one**2)))
            mel = mel_powers(torch.from_numpy(loud))
            start = (len(mel) - FRAMES) // 2
            made.append(mel[start : start + FRAMES])
            speakers.append(number)
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))
    return torch.stack(made)[order], torch.tensor(speakers)[order]


def mel_powers(samples: Tensor) -> Tensor:
    """(frames, 40): 25 ms every 10 ms, 40 triangles of equal area that are even on Slaney's mel scale."""
    spectrum = torch.stft(samples, 400, 160, window=torch.hann_window(400), return_complex=True)
    edges = hertz(torch.linspace(0, float(mels(torch.tensor(8000.0))), 42))
    bins = torch.linspace(0, 8000, 201)
    up = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(up, down).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return (triangles @ spectrum.abs() ** 2).T


def mels(frequency: Tensor) -> Tensor:
    """Linear up to 1000 Hz, 27 to each factor of 6.4 above."""
    above = 15 + torch.log(frequency.clamp(min=1) / 1000) * 27 / math.log(6.4)
    return torch.where(frequency < 1000, frequency * 3 / 200, above)


def hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))


def example_inputs() -> Tensor:
    return spectrograms()[0][:2]


def train_data() -> list[Tensor]:
    whole = spectrograms()[0]
    return batches(whole[: len(whole) // 2], 16)


def eval_data() -> list[tuple[Tensor, Tensor]]:
    whole, speakers = spectrograms()
    half = len(whole) // 2
    return list(zip(whole[half:].split(25), speakers[half:].split(25), strict=True))


def metric(outputs: Any, targets: Any) -> float:
    given, speakers = np.asarray(outputs), np.asarray(targets)
    first, second = np.triu_indices(len(given), 1)
    alike = (given @ given.T)[first, second]
    same = speakers[first] == speakers[second]
    limits = np.sort(alike)
    missed = np.searchsorted(np.sort(alike[same]), limits) / same.sum()
    taken = 1 - np.searchsorted(np.sort(alike[~same]), limits) / (~same).sum()
    at = np.abs(missed - taken).argmin()
    return float(100 - 50 * (missed[at] + taken[at]))


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: NDArray[Any]) -> float:
    return metric(outputs[0], labels)
