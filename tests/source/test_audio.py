"""Sound files of a folder as data."""

from __future__ import annotations

import os
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from model_files import refused, write

from sqakd_fx.errors import SourceError
from sqakd_fx.source.arrays import read_data
from sqakd_fx.source.source import load_source

pytestmark = pytest.mark.usefixtures("clean_imports")

NET = """
from torch import nn

def model():
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
"""


def sound(path: Path, values: list[list[float]], rate: int = 8000) -> Path:
    """A WAV file of 16 bits; a list for each moment, a value for each channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(values[0]))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.array(values) * 32768).astype("<i2").tobytes())
    return path.parent


def test_a_sound_is_cut_or_ends_in_silence(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    folder = sound(tmp_path / "a.wav", [[0.5]] * 6)
    sound(tmp_path / "deeper" / "b.wav", [[-0.25]] * 2)
    data = read_data(folder, (1, 4))
    assert data[0].tolist() == [0.5] * 4
    assert data[1].tolist() == [-0.25, -0.25, 0, 0]
    assert data[0].dtype == torch.float32


def test_channels_are_those_of_the_model(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    folder = sound(tmp_path / "a.wav", [[0.5, 0.25]] * 3)
    assert read_data(folder, (1, 1, 3))[0].tolist() == [[0.375] * 3]
    assert read_data(folder, (1, 2, 3))[0].tolist() == [[0.5] * 3, [0.25] * 3]
    with pytest.raises(SourceError, match="has 2 channels, and the model takes 4"):
        read_data(folder, (1, 4, 3))[0]


def test_a_run_says_the_length_and_the_rate(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    folder = sound(tmp_path / "sounds" / "a.wav", [[0.5]] * 9)
    source = load_source(write(tmp_path, NET), data=folder, input_shape=(1, 1, 4000))
    assert any("first 4000 values" in note and "0.50 s at 8000 Hz" in note for note in source.notes)


def test_files_of_two_rates_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    sound(tmp_path / "a.wav", [[0.5]] * 4)
    folder = sound(tmp_path / "b.wav", [[0.5]] * 4, rate=16000)
    with pytest.raises(SourceError, match=r"b\.wav has 16000 Hz, and .*a\.wav has 8000 Hz"):
        read_data(folder, (1, 4))[1]


def test_a_file_that_does_not_decode_is_named(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(SourceError, match=r"a\.wav does not decode"):
        read_data(tmp_path, (1, 4))


def test_what_is_no_file_is_no_sound(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(SourceError, match="there are no images"):
        read_data(tmp_path, (1, 3, 8, 8))


def test_a_model_of_images_is_told_what_sounds_become(tmp_path: Path) -> None:
    folder = sound(tmp_path / "a.wav", [[0.5]] * 4)
    with pytest.raises(SourceError, match=r"\(N, values\) or \(N, channels, values\)"):
        read_data(folder, (1, 3, 8, 8))


def test_without_soundfile_the_way_to_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    folder = sound(tmp_path / "sounds" / "a.wav", [[0.5]] * 4)
    error = refused(write(tmp_path, NET), data=folder, input_shape=(1, 1, 4))
    assert "pip install 'sqakd-fx[audio]'" in str(error)
