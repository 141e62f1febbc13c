"""Images for the networks of this folder: a folder of them, or a few random ones.

    SQAKD_IMAGES=tiny-imagenet/train sqakd-fx quantize examples/paper/resnet18.py

Without the variable the data is random, which says that everything runs and nothing about accuracy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

FOLDER = "SQAKD_IMAGES"
RANDOM_IMAGES = 64
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def crop_and_flip(image: Tensor, padding: int = 4) -> Tensor:
    """The paper's augmentation of a (channels, height, width) image: random crop and flip."""
    _, height, width = image.shape
    top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
    padded = F.pad(image, (padding,) * 4)
    cropped = padded[:, top : top + height, left : left + width]
    return cropped.flip(2) if torch.rand(()) < 0.5 else cropped


class Images(Dataset[Tensor]):
    """Every .jpg, .jpeg and .png below a folder: (3, size, size), normalized and augmented."""

    def __init__(self, folder: Path, size: int) -> None:
        kinds = {".jpg", ".jpeg", ".png"}
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds)
        if not self.files:
            raise FileNotFoundError(f"{FOLDER}: there are no .jpg or .png images in {folder}")
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            pixels = np.asarray(image.convert("RGB").resize((self.size, self.size)), np.float32)
        unit = torch.from_numpy(pixels / 255).permute(2, 0, 1)
        return crop_and_flip((unit - MEAN) / STD)


def images(size: int) -> Dataset[Tensor] | Tensor:
    """Unlabelled training images (3, size, size)."""
    if folder := os.environ.get(FOLDER):
        return Images(Path(folder), size)
    print(f"the training data is random noise: set {FOLDER} to a folder of images", file=sys.stderr)
    return torch.randn(RANDOM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
