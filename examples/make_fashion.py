"""Make the weights and images of examples/fashion from Debian's package dataset-fashion-mnist (MIT).

Trains the float network with labels on all 60,000 images, then writes its weights, a slice of the
training images without labels, and a slice of the test images with labels.

    PYTHONPATH=examples/fashion python examples/make_fashion.py
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from model import HERE, augment, normalize
from network import FashionNet
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

SOURCE = Path("/usr/share/datasets/fashion-mnist")
EPOCHS, BATCH, RATE = 14, 128, 0.12
TRAIN_IMAGES, TEST_IMAGES = 8_000, 2_500
OF_THE_WHEEL = {"train_images": 2_000, "test": 1_000}
"""How many of them `sqakd-fx example` writes; the others are in files of their own."""


def read(name: str) -> np.ndarray:
    """An IDX file of bytes: images N×28×28 or labels N."""
    raw = gzip.decompress((SOURCE / name).read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def accuracy(network: FashionNet, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    network.eval()
    with torch.no_grad():
        hits = [
            (network(x).argmax(1) == y).sum()
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return 100 * float(torch.stack(hits).sum()) / len(labels)


def train(network: FashionNet, images: Tensor, labels: Tensor) -> None:
    """SGD with Nesterov momentum and one cycle of the learning rate."""
    optimizer = torch.optim.SGD(network.parameters(), RATE, 0.9, weight_decay=5e-4, nesterov=True)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.2)
    for epoch in range(EPOCHS):
        network.train()
        order = torch.randperm(len(images))
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(network(augment(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {float(loss):.3f}", flush=True)


def store(kind: str, **arrays: np.ndarray) -> None:
    """Write the samples of the wheel, and those that the repository has beside them."""
    first = OF_THE_WHEEL[kind]
    np.savez_compressed(
        HERE / f"{kind}.npz", **{name: array[:first] for name, array in arrays.items()}
    )
    np.savez_compressed(
        HERE / f"{kind}_more.npz", **{name: array[first:] for name, array in arrays.items()}
    )


def main() -> None:
    torch.manual_seed(0)
    train_images, train_labels = (
        read("train-images-idx3-ubyte.gz"),
        read("train-labels-idx1-ubyte.gz"),
    )
    test_images, test_labels = read("t10k-images-idx3-ubyte.gz"), read("t10k-labels-idx1-ubyte.gz")
    network = FashionNet()
    train(network, normalize(train_images), torch.from_numpy(train_labels).long())
    full = accuracy(network, normalize(test_images), torch.from_numpy(test_labels).long())

    rng = np.random.default_rng(0)
    chosen = np.concatenate(
        [
            rng.permutation(np.flatnonzero(train_labels == c))[: TRAIN_IMAGES // 10]
            for c in range(10)
        ]
    )
    store("train_images", images=train_images[rng.permutation(chosen)])
    some = rng.permutation(len(test_images))[:TEST_IMAGES]
    store("test", images=test_images[some], labels=test_labels[some])
    save_file(network.state_dict(), HERE / "weights.safetensors")
    sliced = accuracy(
        network, normalize(test_images[some]), torch.from_numpy(test_labels[some]).long()
    )
    print(f"float accuracy: {full:.2f} % of all test images, {sliced:.2f} % of the slice")
    size = sum(p.stat().st_size for p in HERE.iterdir() if p.is_file())
    print(
        f"{size / 1e6:.2f} MB in {HERE.name}/, {sum(p.numel() for p in network.parameters())} parameters"
    )


if __name__ == "__main__":
    main()
