"""The example of the main job: `sqakd-fx quantize examples/fashion/model.py`."""

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
    images = normalize(np.load(HERE / "train_images.npz")["images"])
    return DataLoader(
        Images(images), batch_size=128, shuffle=True, drop_last=True, collate_fn=lambda batch: batch
    )


def eval_data() -> Iterator[tuple[Tensor, Tensor]]:
    """Labelled test images, used only to report accuracy."""
    with np.load(HERE / "test.npz") as archive:
        images, labels = normalize(archive["images"]), torch.from_numpy(archive["labels"]).long()
    yield from zip(images.split(250), labels.split(250), strict=True)
