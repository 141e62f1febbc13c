"""DNSMOS: three opinion scores of 9 seconds of sound, a CNN over a spectrogram that it computes; from an ONNX file."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from inputs import MUSIC, SPEECH, batches, music, package_file, voices, windows
from numpy.typing import NDArray
from torch import Tensor, nn

FAMILY = "regression CNN, from ONNX"
WEIGHTS = ("speechmos==0.0.1.1", "onnx2torch==1.5.15")
LIBRARIES = ("torchvision", "scipy")
INPUTS = f"{SPEECH}; {MUSIC}; mixed at many levels"
SCORE = "correlation with float's scores (%)"
SAMPLES = 144_160


def model() -> nn.Module:
    from onnx2torch import convert

    path = package_file("speechmos", "dnsmos_models", "sig_bak_ovr.onnx")
    return convert(str(path)).eval()  # type: ignore[no-any-return]


@cache
def sounds() -> Tensor:
    """Speech, made long enough by what the same speaker says next, over music of many levels."""
    speech = [np.concatenate(one) for one in voices(16_000, 2.5, 20).values()]
    spoken, played = windows(speech, SAMPLES, 96), windows(music(16_000), SAMPLES, 96)
    levels = np.linspace(0, 1, 96, dtype=np.float32)[:, None]
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(spoken + levels * played)[order]


def example_inputs() -> Tensor:
    return sounds()[:2]


def train_data() -> list[Tensor]:
    return batches(sounds()[:64], 4)


def held_out() -> list[Tensor]:
    return batches(sounds()[64:], 4)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: None) -> float:
    columns = zip(outputs[0].T, exact[0].T, strict=True)
    return float(min(np.corrcoef(found, wanted)[0, 1] for found, wanted in columns) * 100)
