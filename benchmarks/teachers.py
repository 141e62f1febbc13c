"""Float networks for the tables of low bits, trained on CIFAR-10 with labels, on a GPU or over hours on a CPU.

    python benchmarks/teachers.py NETWORK [--epochs 200] [--minutes M] [--images N] [--out FOLDER]

SGD with Nesterov momentum, or AdamW for the transformer; warm-up and a cosine; random crops, flips and erased squares;
smoothed labels. After each epoch a checkpoint goes to FOLDER/NETWORK. A run that was stopped, or ran out of minutes,
goes on from there. The weights are FOLDER/NETWORK.safetensors, beside them what was measured in FOLDER/NETWORK.json.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cifar_networks import NETWORKS
from image_sets import BATCH, IMAGE_SETS, ImageSet
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from training import machine

from sqakd_fx.engine.devices import choose_device
from sqakd_fx.storage import write_atomically, write_json
from sqakd_fx.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)

_ERASED = 8
"""Pixels along a side of the square that is erased."""
_MEASURED_EVERY = 5
"""Epochs."""


@dataclass(frozen=True)
class Schedule:
    """How a network is trained. `warm_up` and `epochs` count epochs."""

    optimizer: str
    learning_rate: float
    weight_decay: float
    smoothing: float
    warm_up: int
    epochs: int

    def rate_at(self, epoch: float) -> float:
        """A line up, then half a cosine down to 0."""
        if epoch < self.warm_up:
            return self.learning_rate * epoch / self.warm_up
        done = (epoch - self.warm_up) / max(self.epochs - self.warm_up, 1)
        return self.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 have instructions of their own there."""
    if device.type != "cpu":
        return True
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def schedule_of(name: str, epochs: int) -> Schedule:
    warm_up = min(5, epochs // 4)
    if name == "deit_tiny":
        return Schedule("adamw", 1e-3, 0.05, 0.1, warm_up, epochs)
    return Schedule("sgd", 0.1, 5e-4, 0.1, warm_up, epochs)


def optimizer_of(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Vectors (biases, normalizations) have no weight decay."""
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=schedule.weight_decay)
    return torch.optim.SGD(
        groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay
    )


def erased(images: Iterable[tuple[Tensor, Tensor]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A square of zeros, which are the mean, at a random place of each image."""
    chance = torch.Generator().manual_seed(seed)
    for x, y in images:
        size = x.shape[-1]
        corners = torch.randint(1 - _ERASED, size, (2, len(x), 1), generator=chance).to(x.device)
        places = torch.arange(size, device=x.device)
        rows, columns = ((places >= at) & (places < at + _ERASED) for at in corners)
        yield x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0), y


class Training:
    """A network on its way, with all that a later process needs to go on."""

    def __init__(self, name: str, schedule: Schedule, folder: Path, device: torch.device) -> None:
        torch.manual_seed(0)
        self.name, self.schedule, self.folder, self.device = name, schedule, folder, device
        layout = torch.channels_last
        self.network: nn.Module = NETWORKS[name]().to(device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = optimizer_of(self.network, schedule)
        self.epoch, self.seconds = 0, 0.0
        self._go_on()

    def _go_on(self) -> None:
        known, notes = latest_checkpoint(self.folder / self.name)
        for note in notes:
            print(note, flush=True)
        if known is None:
            return
        epochs = known.state["epochs"]
        if epochs != self.schedule.epochs:
            raise SystemExit(
                f"{self.folder / self.name} is of {epochs} epochs: give --epochs {epochs}"
            )
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}}
        for name, tensor in known.tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        self.network.load_state_dict(parts["network"])
        unpack_optimizer(self.optimizer, parts["optimizer"], known.state["optimizer"])
        self.epoch, self.seconds = known.step, known.state["seconds"]

    def keep(self) -> None:
        """A checkpoint of this epoch."""
        packed, values = pack_optimizer(self.optimizer)
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in packed.items()}
        state = {
            "epochs": self.schedule.epochs,
            "seconds": self.seconds,
            "optimizer": values,
        }
        save_checkpoint(self.folder / self.name, Checkpoint(self.epoch, tensors, state))

    def run_epoch(self, data: ImageSet, pixels: Tensor, labels: Tensor) -> float:
        """One epoch; its mean loss."""
        started = time.monotonic()
        self.network.train()
        total = torch.zeros((), device=self.device)
        steps = data.steps()
        half = torch.autocast(
            self.device.type, torch.bfloat16, enabled=multiplies_bfloat16(self.device)
        )
        images = erased(data.epoch(pixels, labels, self.epoch, 0), self.epoch)
        for step, (x, y) in enumerate(images):
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.rate_at(self.epoch + step / steps)
            with half:
                scores = self.network(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(scores.float(), y, label_smoothing=self.schedule.smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        self.epoch += 1
        mean = float(total) / steps
        self.seconds += time.monotonic() - started
        return mean

    @torch.no_grad()
    def top1(self, data: ImageSet, pixels: Tensor, labels: Tensor) -> float:
        """In percent, of the test images."""
        self.network.eval()
        hits = [
            (self.network(data.normalized(x)).argmax(1) == y).sum()
            for x, y in zip(pixels.split(500), labels.split(500), strict=True)
        ]
        return 100 * int(torch.stack(hits).sum()) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after these, to go on later"
    )
    parser.add_argument("--images", type=int, help="of the training images, the first so many")
    parser.add_argument("--out", type=Path, default=Path("sqakd-out/teachers"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device, data = choose_device("auto"), IMAGE_SETS["cifar10"]
    train, test = (
        [x[: options.images].to(device) for x in data.read(part, options.out)]
        for part in ("train", "test")
    )
    data = replace(data, train_images=len(train[0]))
    until = time.monotonic() + 60 * options.minutes
    schedule = schedule_of(options.network, options.epochs)
    training = Training(options.network, schedule, options.out, device)
    print(f"{options.network}, batches of {BATCH}, {schedule}, {machine()}", flush=True)
    while training.epoch < options.epochs and time.monotonic() < until:
        loss = training.run_epoch(data, *train)
        training.keep()
        line = (
            f"epoch {training.epoch} of {options.epochs}: loss {loss:.4f}, {training.seconds:.0f} s"
        )
        if training.epoch % _MEASURED_EVERY == 0 or training.epoch == options.epochs:
            line += f", top-1 {training.top1(data, *test):.2f} %"
        print(line, flush=True)
    if training.epoch < options.epochs:
        raise SystemExit(f"{training.epoch} of {options.epochs} epochs: the same command goes on")
    weights = {k: v.contiguous().cpu() for k, v in training.network.state_dict().items()}
    path = options.out / f"{options.network}.safetensors"
    write_atomically(path, lambda temporary: save_file(weights, temporary))
    found = {
        "top1": training.top1(data, *test),
        "epochs": options.epochs,
        "seconds": training.seconds,
        "machine": machine(),
    }
    write_json(options.out / f"{options.network}.json", found)
    print(f"{path}: top-1 {found['top1']:.2f} %")


if __name__ == "__main__":
    main()
