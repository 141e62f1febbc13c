"""A folder of sound files as unlabelled samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sqakd_fx.errors import SourceError, short
from sqakd_fx.source.folders import files_of
from sqakd_fx.source.libraries import library

_SUFFIXES = {".wav", ".flac"}


class AudioFolder(Dataset[Tensor]):
    """The first `length` values of each sound file at any depth below a folder, float32 in [-1, 1].

    Samples are (length,), or (channels, length) where `channels` is given. Shorter files end in silence.

    Raises:
        SourceError: a file does not decode, or has another rate or other channels than the model is given.
    """

    def __init__(self, folder: Path, *, channels: int | None, length: int) -> None:
        self.files = sound_files(folder)
        self.channels, self.length = channels, length
        self.soundfile = library("soundfile", f"--data {folder}", "audio")
        self.rate = int(self._read(self.files[0])[1])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index]
        values, rate = self._read(path)
        if rate != self.rate:
            raise SourceError(
                f"the sound file {path} has {rate} Hz, and {self.files[0]} has {self.rate} Hz: give files of one rate"
            )
        wave = torch.from_numpy(np.pad(values, ((0, self.length - len(values)), (0, 0))).T.copy())
        if self.channels is None:
            return wave.mean(0)
        if self.channels == 1:
            return wave.mean(0, keepdim=True)
        if len(wave) != self.channels:
            raise SourceError(
                f"the sound file {path} has {len(wave)} channels, and the model takes {self.channels}: convert it"
            )
        return wave

    def note(self) -> str:
        """What happens to a sound, in one line."""
        seconds = self.length / self.rate
        return (
            f"of each sound file the first {self.length} values are taken, {seconds:.2f} s at {self.rate} Hz, "
            "in [-1, 1]; shorter ones end in silence: give files at the rate that the model was trained with"
        )

    def _read(self, path: Path) -> tuple[np.ndarray[Any, Any], int]:
        try:
            values, rate = self.soundfile.read(
                path, frames=self.length, dtype="float32", always_2d=True
            )
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise SourceError(
                f"the sound file {path} does not decode ({short(error)}): remove or replace it"
            ) from error
        return values, int(rate)


def sound_files(folder: Path) -> list[Path]:
    return files_of(folder, _SUFFIXES)


def read_audio(folder: Path, shape: tuple[int, ...] | None) -> AudioFolder:
    """Samples of a folder of sound files for a model whose input has `shape`.

    Raises:
        SourceError: the model's input is no sound, a file does not decode, or soundfile is not installed.
    """
    if shape is None or len(shape) not in (2, 3):
        raise SourceError(
            f"the sound files in {folder} become inputs of shape (N, values) or (N, channels, values), and the model's "
            f"input {'is not known' if shape is None else f'has the shape {shape}'}: give --input-shape such as "
            "1,16000, or train_data() in model.py"
        )
    return AudioFolder(folder, channels=shape[1] if len(shape) == 3 else None, length=shape[-1])
