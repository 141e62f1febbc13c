"""A folder of images as unlabelled samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from sqakd_fx.errors import SourceError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


class ImageFolder(Dataset[Tensor]):
    """Images at any depth below a folder, each (channels, height, width), float32 in [0, 1].

    Raises:
        SourceError: there are no images, or one does not decode; names the file.
    """

    def __init__(self, folder: Path, *, channels: int, height: int, width: int) -> None:
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not self.files:
            raise SourceError(
                f"there are no images in {folder}: give a folder of .jpg or .png files"
            )
        if channels not in (1, 3, 4):
            raise SourceError(
                f"images have 1, 3 or 4 channels, the model takes {channels}: give .npy data"
            )
        self.mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        self.size = (width, height)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index]
        try:
            with Image.open(path) as image:
                resized = image.convert(self.mode).resize(self.size, Image.Resampling.BILINEAR)
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
        pixels = np.asarray(resized, dtype=np.float32) / 255
        tensor = torch.from_numpy(pixels)
        return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()
