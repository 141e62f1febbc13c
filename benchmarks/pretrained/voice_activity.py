"""A voice activity detector: a Fourier transform as a convolution, four convolutions, an LSTM over the frames."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from inputs import MUSIC, SPEECH, batches, music, package_file, voices, windows
from numpy.typing import NDArray
from torch import Tensor, nn

FAMILY = "CNN and LSTM"
WEIGHTS = ("silero-vad==6.2.3",)
LIBRARIES = ("safetensors", "scipy")
INPUTS = f"{SPEECH}; {MUSIC}"
SCORE = "speech or music, area under the ROC curve over 160 pieces (%)"
FRAME, CONTEXT, FRAMES = 512, 64, 32


class VoiceDetector(nn.Module):
    """Probabilities of speech of FRAMES frames, each given with the samples in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, frames: Tensor) -> Tensor:
        x = nn.functional.pad(frames.flatten(0, 1).unsqueeze(1), (0, 64), mode="reflect")
        x = self.stft_conv(x)
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        x = self.conv1(x).relu()
        x = self.conv2(x).relu()
        x = self.conv3(x).relu()
        x = self.conv4(x).relu().squeeze(-1)
        x, _ = self.lstm(x.unflatten(0, (frames.shape[0], frames.shape[1])))
        return self.final_conv(x.relu().transpose(1, 2)).sigmoid().squeeze(1)


def model() -> nn.Module:
    from safetensors.torch import load_file

    saved = load_file(package_file("silero_vad", "data", "silero_vad_16k.safetensors"))
    renamed = {
        f"{name.replace('lstm_cell', 'lstm')}_l0" if "lstm_cell" in name else name: value
        for name, value in saved.items()
    }
    network = VoiceDetector()
    network.load_state_dict(renamed)
    return network.eval()


def framed(pieces: NDArray[np.float32]) -> Tensor:
    """(N, FRAMES, CONTEXT + FRAME) of pieces that begin with the first context."""
    starts = np.arange(FRAMES) * FRAME
    return torch.from_numpy(np.stack([pieces[:, at : at + CONTEXT + FRAME] for at in starts], 1))


@cache
def sounds() -> tuple[Tensor, Tensor]:
    """Pieces of speech (1) and of music (0), mixed."""
    length = FRAMES * FRAME + CONTEXT
    speech = [one for speaker in voices(16_000, 1.2, 40).values() for one in speaker]
    pieces = [windows(speech, length, 160), windows(music(16_000), length, 160)]
    labels = torch.tensor([1] * len(pieces[0]) + [0] * len(pieces[1]))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return framed(np.concatenate(pieces))[order], labels[order]


def example_inputs() -> Tensor:
    return sounds()[0][:2]


def train_data() -> list[Tensor]:
    return batches(sounds()[0][:160], 16)


def eval_data() -> list[tuple[Tensor, Tensor]]:
    pieces, labels = sounds()
    return list(zip(pieces[160:].split(20), labels[160:].split(20), strict=True))


def metric(outputs: Any, targets: Any) -> float:
    mean, speech = np.asarray(outputs).mean(1), np.asarray(targets) == 1
    above = mean[speech][:, None] - mean[~speech][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean() * 100)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: NDArray[Any]) -> float:
    return metric(outputs[0], labels)
