"""The example of the main job: `sqakd-fx quantize model.py`.

`sqakd-fx example` writes 2,000 unlabelled images and 1,000 labelled ones beside this file; the repository has 8,000 and
2,500, of which the others lie in train_images_more.npz and test_more.npz.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from network import FashionNet
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

HERE = Path(__file__).parent
MEAN, STD = 0.2860, 0.3530


def stored(kind: str, name: str) -> np.ndarray:
    """An array of every file of a kind, one behind the other."""
    return np.concatenate([np.load(file)[name] for file in sorted(HERE.glob(f"{kind}*.npz"))])


def normalize(images: np.ndarray) -> Tensor:
    """N×28×28 bytes to N×1×28×28 floats."""
    return (torch.from_numpy(images).float().div_(255) - MEAN).div_(STD).unsqueeze(1)


def augment(images: Tensor) -> Tensor:
    """A random crop with 2 pixels of padding and a random flip, for a whole batch at once."""
    n, _, height, width = images.shape
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    rows = torch.randint(0, 5, (n, 1)) + torch.arange(height)
    columns = torch.randint(0, 5, (n, 1)) + torch.arange(width)
    flip = torch.rand(n, 1) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None]].unsqueeze(
        1
    )


class Images(Dataset[Tensor]):
    """Unlabelled images, fetched and augmented a batch at a time."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return augment(self.images[indices])


def model() -> nn.Module:
    """The trained float network."""
    network = FashionNet()
    network.load_state_dict(load_file(HERE / "weights.safetensors"))
    return network.eval()


def example_inputs() -> tuple[Tensor, ...]:
    """One batch, to trace the network with."""
    return (torch.zeros(2, 1, 28, 28),)


def train_data() -> DataLoader[Tensor]:
    """Images without labels."""
    images = normalize(stored("train_images", "images"))
    return DataLoader(
        Images(images), batch_size=128, shuffle=True, drop_last=True, collate_fn=lambda batch: batch
    )


def eval_data() -> Iterator[tuple[Tensor, Tensor]]:
    """Labelled test images, used only to report accuracy."""
    images = normalize(stored("test", "images"))
    labels = torch.from_numpy(stored("test", "labels")).long()
    yield from zip(images.split(250), labels.split(250), strict=True)
