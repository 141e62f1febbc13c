"""A folder of images as unlabelled samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from sqakd_fx.errors import SourceError
from sqakd_fx.source.folders import files_of
from sqakd_fx.source.transform import Transform

_WHITE_16 = 65535.0
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
"""Whatever a file is called, no other is decoded: Pillow gives PostScript to a program of its own."""
_KEPT_BYTES = 1 << 30
"""Of decoded and cropped images: a photo of a phone takes longer to decode than to train on."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


def image_files(folder: Path) -> list[Path]:
    return files_of(folder, _SUFFIXES)


class ImageFolder(Dataset[Tensor]):
    """Images at any depth below a folder, each (channels, height, width), float32, as the transform makes them.

    The first that are read are kept in memory as bytes, up to 1 GiB, so that no later pass decodes them again.

    Raises:
        SourceError: there are no images, or one does not decode; names the file.
    """

    def __init__(
        self, folder: Path, *, channels: int, height: int, width: int, transform: Transform
    ) -> None:
        self.files = image_files(folder)
        if not self.files:
            raise SourceError(
                f"there are no images in {folder}: give a folder of .jpg or .png files"
            )
        if channels not in (1, 3, 4):
            raise SourceError(
                f"images have 1, 3 or 4 channels, the model takes {channels}: give .npy data"
            )
        transform.check(channels, height, width)
        self.transform = transform
        self.mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        self.height, self.width = height, width
        self.kept: dict[int, np.ndarray[Any, Any]] = {}
        self.most_kept = _KEPT_BYTES // (height * width * channels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = self.kept.get(index)
        if pixels is None:
            pixels = self._decoded(self.files[index])
            if pixels.dtype == np.uint8 and len(self.kept) < self.most_kept:
                self.kept[index] = pixels
        return self.transform.normalized(self._tensor(pixels))

    def __getstate__(self) -> dict[str, Any]:
        """Without the images that are kept: a process that loads data keeps its own."""
        return {**self.__dict__, "kept": {}}

    def _decoded(self, path: Path) -> np.ndarray[Any, Any]:
        try:
            with Image.open(path, formats=_FORMATS) as image:
                return self._pixels(image, path)
        except (
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            SyntaxError,
            ValueError,
        ) as error:
            raise SourceError(
                f"the image {path} does not decode ({error}): remove or replace it"
            ) from error

    def _pixels(self, image: Image.Image, path: Path) -> np.ndarray[Any, Any]:
        """Cropped, (height, width) or (height, width, channels): bytes, or float32 in [0, 1] of 16-bit grey."""
        if image.mode == "F":
            raise SourceError(
                f"the image {path} has float pixels of a range that nobody knows: give them as --data FILE.npy, scaled "
                "as the model takes them"
            )
        if image.mode.startswith("I"):
            return self._of_16_bits(np.asarray(image, dtype=np.float32), path)
        return np.array(self.transform.cropped(image.convert(self.mode), self.height, self.width))

    def _tensor(self, pixels: np.ndarray[Any, Any]) -> Tensor:
        """(channels, height, width), float32, in [0, 1]."""
        scaled = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
        tensor = torch.from_numpy(scaled)
        return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()

    def _of_16_bits(self, pixels: np.ndarray[Any, Any], path: Path) -> np.ndarray[Any, Any]:
        """Grey of 16 bits, which Pillow would clip to 8."""
        if pixels.max(initial=0) > _WHITE_16:
            raise SourceError(
                f"the image {path} has pixels above {_WHITE_16:.0f}: give them as --data FILE.npy, scaled as the model "
                "takes them"
            )
        scaled = Image.fromarray(pixels / _WHITE_16)
        grey = np.array(self.transform.cropped(scaled, self.height, self.width))
        if self.mode == "L":
            return grey
        opaque = [np.ones_like(grey)] if self.mode == "RGBA" else []
        return np.stack([grey, grey, grey, *opaque], axis=-1)
