"""Unlabelled samples from a path: a folder of images or sounds, an array, or a file of sentences."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sqakd_fx.diagnostics.wording import require_exists
from sqakd_fx.errors import SourceError, short
from sqakd_fx.source.audio import AudioFolder, read_audio, sound_files
from sqakd_fx.source.images import ImageFolder, image_files
from sqakd_fx.source.replay import memory
from sqakd_fx.source.text import SUFFIXES, Sentences, read_text
from sqakd_fx.source.transform import Transform

_ARRAY_NAMES = ("images", "x", "data")
_LARGEST_RATIO = 200
"""Bytes that a byte of an archive may become: images of few colours reach 100, an archive made to fill memory 1000."""
_SMALL = 256 << 20
"""Bytes that are unpacked from any archive."""


class ArraySamples(Dataset[Tensor]):
    """Samples of an array of shape (N, ...).

    uint8 becomes float32 in [0, 1], floats become float32, other integers stay.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        sample = np.array(self.array[index])
        if sample.dtype == np.uint8:
            return torch.from_numpy(sample).float() / 255
        tensor = torch.from_numpy(sample)
        return tensor.float() if tensor.is_floating_point() else tensor


def read_data(
    path: Path,
    shape: tuple[int, ...] | None,
    transform: Transform | None = None,
    *,
    tokenizer: str | None = None,
    takes: Collection[str] = (),
) -> Dataset[Any]:
    """Samples for a model whose first input has `shape`.

    `transform` is what images go through, `tokenizer` what sentences do; `takes` are the names of the model's inputs.
    """
    require_exists(path, "--data")
    kind = _kind(path)
    if tokenizer is not None and kind != "a file of sentences":
        raise SourceError(
            f"--data {path} is {kind}, and --tokenizer is for sentences: give {', '.join(SUFFIXES)}"
        )
    if transform is not None and kind != "a folder of images":
        raise SourceError(
            f"--data {path} is {kind}, and --transform, --mean, --std, --resize and --crop are for images: "
            "give it as the model takes it"
        )
    if kind == "a folder of images":
        return _read_images(path, shape, transform or Transform())
    if kind == "a folder of sounds":
        return read_audio(path, shape)
    if kind == "a file of sentences":
        return read_text(path, shape, tokenizer, takes)
    return _read_array(path, shape)


def what_happens(samples: Any) -> str | None:
    """What is done to sentences or sounds, in one line; None for other samples."""
    return samples.note() if isinstance(samples, Sentences | AudioFolder) else None


def _kind(path: Path) -> str:
    """What a path holds."""
    if path.is_dir():
        sounds = sound_files(path) and not image_files(path)
        return "a folder of sounds" if sounds else "a folder of images"
    if path.suffix in SUFFIXES and path.is_file():
        return "a file of sentences"
    if path.suffix in (".npy", ".npz") and path.is_file():
        return "an array"
    raise SourceError(
        f"--data {path} is neither a folder of images or sounds, nor .npy, .npz, {', '.join(SUFFIXES)}: "
        "give one of these"
    )


def _read_images(folder: Path, shape: tuple[int, ...] | None, transform: Transform) -> ImageFolder:
    if shape is None:
        raise SourceError(
            f"the images in {folder} need a size: give --input-shape such as 1,3,224,224, "
            "or add example_inputs() to model.py"
        )
    if len(shape) != 4:
        raise SourceError(
            f"images in {folder} cannot become inputs of shape {shape}, which is not "
            "(N, channels, height, width): give --data as .npy, or train_data() in model.py"
        )
    _, channels, height, width = shape
    return ImageFolder(folder, channels=channels, height=height, width=width, transform=transform)


def _read_array(path: Path, shape: tuple[int, ...] | None) -> ArraySamples:
    try:
        if path.suffix == ".npz":
            array = _from_archive(path)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        OSError,
        ValueError,
        EOFError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        foreign = isinstance(error, ValueError) and "pickle" in str(error)
        reason = "it is not one of numbers" if foreign else short(error)
        raise SourceError(
            f"the array in {path} cannot be read ({reason}): "
            "save a plain numeric array with np.save or np.savez"
        ) from error
    if array.ndim == 0 or len(array) == 0:
        raise SourceError(f"the array in {path} is empty: save one of shape (N, ...)")
    return ArraySamples(_fitted(array, shape, path))


def _from_archive(path: Path) -> np.ndarray[Any, Any]:
    """One array of an .npz file, unpacked only where it fits.

    Raises:
        SourceError: there is none, or it is larger than memory allows.
    """
    with np.load(path, allow_pickle=False) as arrays:
        name = next((n for n in _ARRAY_NAMES if n in arrays), next(iter(arrays), None))
        if name is None:
            raise SourceError(f"{path} is empty, it has no array: save one named images")
        with zipfile.ZipFile(path) as archive:
            member = next(m for m in (f"{name}.npy", name) if m in archive.namelist())
            packed, unpacked = archive.getinfo(member).compress_size, _array_bytes(archive, member)
        if unpacked > memory() / 2 or unpacked > max(_LARGEST_RATIO * packed, _SMALL):
            raise SourceError(
                f"the array {name!r} in {path} unpacks from {packed / 2**20:.1f} MiB to {unpacked / 2**20:.0f} MiB, "
                "more than is taken unasked: save it with np.save as .npy, which is read piece by piece"
            )
        array: np.ndarray[Any, Any] = arrays[name]
        return array


def _array_bytes(archive: zipfile.ZipFile, member: str) -> int:
    """Bytes of an array by its own header, and at least those that the archive says."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    return max(math.prod(shape) * dtype.itemsize, archive.getinfo(member).file_size)


def _fitted(
    array: np.ndarray[Any, Any], shape: tuple[int, ...] | None, path: Path
) -> np.ndarray[Any, Any]:
    if array.ndim == 3 and (shape is None or len(shape) == 4):
        array = array[:, None]
    if shape is None or array.shape[1:] == shape[1:]:
        return array
    if array.ndim == 4 and np.moveaxis(array, -1, 1).shape[1:] == shape[1:]:
        return np.moveaxis(array, -1, 1)
    raise SourceError(
        f"the samples in {path} have the shape {array.shape[1:]}, but the model's input has "
        f"{shape[1:]}: give another --input-shape or resize the array"
    )
