"""Accuracy of every method at equal budget, with labels and without: a table.

    python benchmarks/accuracy.py [ROW_GLOB ...] [--epochs 5] [--seeds 1] [--out FOLDER] [--list]

CIFAR-10 with a trained ResNet-20, both looked for in ../shared beside the repository (a tar of JPEG files
and a safetensors file). Every row starts from the same teacher and takes the same number of steps on the
same augmented images (random crop with 4 pixels of padding, horizontal flip). A row is METHOD-BITS-LOSS:
"default" is the preset of the bit width, other methods are families inside it; "sqakd" distils without
labels, "labels" minimises cross-entropy with them. Finished rows are kept in FOLDER and not run again.
What is measured is the exported model under ONNX Runtime, on all 10,000 test images.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
import statistics
import tarfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from resnet20 import WEIGHTS, resnet20
from sqakd_fx.exporters.profiles import write_profile
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sqakd_fx.calibrate import calibrate
from sqakd_fx.distil import distil
from sqakd_fx.pipeline import choose_device, export_job, reestimate_batch_norm
from sqakd_fx.program import build_program, distillation_teacher, lower
from sqakd_fx.recipe import resolve_recipe
from sqakd_fx.validate import session

ARCHIVE = WEIGHTS.parents[1] / "data" / "cifar10-jpeg.tar.xz"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 128
DEFAULTS = [f"default-{bits}-sqakd" for bits in ("w8a8", "w4a4", "w2a2", "w1a1")]
FULL = [
    f"{f}-{b}-{loss}"
    for f in ("lsq", "ewgs")
    for b in ("w8a8", "w4a4", "w2a2", "w1a1")
    for loss in ("sqakd", "labels")
]
FAMILIES = [
    f"{f}-{b}-{loss}"
    for f in ("minmax", "percentile", "dorefa", "pact", "lsq+", "sawb", "qil")
    for b in ("w4a4", "w2a2")
    for loss in ("sqakd", "labels")
]
ROWS = [*DEFAULTS, *FULL, *FAMILIES]


def images(part: str, folder: Path) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, 32, 32) and labels of "train" or "test"; decoded once and kept."""
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


def normalised(pixels: Tensor) -> Tensor:
    mean = torch.tensor(MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def epoch_of(
    pixels: Tensor, labels: Tensor, number: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, cropped and flipped batches; the same number gives the same batches."""
    chance = torch.Generator().manual_seed(1000 * seed + number)
    order = torch.randperm(len(pixels), generator=chance)
    for rows in order.split(BATCH):
        if len(rows) < BATCH:
            return
        padded = F.pad(pixels[rows.to(pixels.device)].float(), (4, 4, 4, 4), mode="reflect")
        dy, dx = torch.randint(0, 9, (2, BATCH, 1), generator=chance).to(pixels.device)
        flip = torch.rand(BATCH, 1, generator=chance).to(pixels.device) < 0.5
        across = torch.arange(32, device=pixels.device)
        columns = torch.where(flip, 31 - across, across) + dx
        index = torch.arange(BATCH, device=pixels.device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[index, (across + dy)[:, :, None], columns[:, None, :]]
        yield normalised(cropped.permute(0, 3, 1, 2)), labels[rows.to(pixels.device)]


class WithLabels(nn.Module):
    """A "teacher" that is sure of the labels: KL to it at temperature 1 is cross-entropy."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 1e4 * F.one_hot(y, 10).float()


class WithoutLabels(nn.Module):
    """A network as a function of (images, labels) that reads only the images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def run_row(
    name: str, seed: int, epochs: int, folder: Path, overrides: list[str]
) -> dict[str, Any]:
    """Train, export and measure one row."""
    started = time.perf_counter()
    method, bits, kind = name.rsplit("-", 2)
    settings = [*overrides]
    if method != "default":
        settings += [f"weight_family={method!r}", f"activation_family={method!r}"]
    if kind == "labels":
        settings.append("temperature=1.0")
    recipe = resolve_recipe(bits, settings=settings, epochs=epochs, seed=seed)
    device = choose_device("auto")
    pixels, labels = (x.to(device) for x in images("train", folder))
    torch.manual_seed(seed)
    program = build_program(resnet20(), (torch.zeros(2, 3, 32, 32),), {}, recipe)
    student = program.student.to(device)
    first = epoch_of(pixels, labels, 0, seed)
    calibrate(
        student,
        [(next(first)[0],) for _ in range(recipe.calibration_batches)],
        method=recipe.initialisation,
    )
    teacher: nn.Module = (
        WithLabels()
        if kind == "labels"
        else WithoutLabels(distillation_teacher(program).to(device))
    )
    wrapped = WithoutLabels(student)
    done = distil(
        wrapped,  # type: ignore[arg-type]
        teacher,
        lambda number: epoch_of(pixels, labels, number, seed),
        recipe,
        steps_per_epoch=len(pixels) // BATCH,
        device=device,
    )
    if recipe.reestimate_batch_norm:
        batches = ((x,) for x, _ in epoch_of(pixels, labels, 0, seed))
        reestimate_batch_norm(
            student, [next(batches) for _ in range(recipe.reestimate_batch_norm)], device
        )
    student.cpu().eval()
    path = write_profile(
        "packed",
        export_job(lower(student).graph_module, program, recipe),
        folder / f"{name}-{seed}.onnx",
    ).path
    return {
        "name": name,
        "seed": seed,
        "epochs": epochs,
        "accuracy": accuracy(path, folder),
        "loss": done.loss,
        "seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "precision": recipe.precision,
    }


def accuracy(path: Path, folder: Path) -> float:
    """Top-1 in percent of an ONNX file on the test images."""
    running = session(path)
    pixels, labels = images("test", folder)
    right = 0
    for rows in torch.arange(len(pixels)).split(500):
        (scores,) = running.run(
            None, {running.get_inputs()[0].name: normalised(pixels[rows]).numpy()}
        )
        right += int((scores.argmax(1) == labels[rows].numpy()).sum())
    return 100 * right / len(pixels)


def teacher_accuracy(folder: Path) -> float:
    pixels, labels = images("test", folder)
    net: nn.Module | fx.GraphModule = resnet20()
    with torch.no_grad():
        found = torch.cat([net(normalised(part)).argmax(1) for part in pixels.split(500)])
    return 100 * float((found == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("globs", nargs="*", default=["*"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--out", type=Path, default=Path("sqakd-out/accuracy"))
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    names = [n for n in ROWS if any(fnmatch.fnmatch(n, g) for g in options.globs)]
    if options.list:
        print("\n".join(names))
        return
    missing = [path for path in (WEIGHTS, ARCHIVE) if not path.exists()]
    if missing:
        raise SystemExit(f"{missing[0]} is not there: this benchmark needs it")
    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    float_accuracy = teacher_accuracy(options.out)
    print(f"float: {float_accuracy:.2f}\n")
    print("| row | seeds | accuracy | minus float | seconds |\n|---|---|---|---|---|", flush=True)
    for name in names:
        found = []
        for seed in range(options.seeds):
            kept = options.out / f"{name}-{seed}-{options.epochs}.json"
            if not kept.exists():
                row = run_row(name, seed, options.epochs, options.out, options.settings)
                kept.write_text(json.dumps(row, indent=2))
            found.append(json.loads(kept.read_text()))
        scores = [row["accuracy"] for row in found]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        mean = statistics.mean(scores)
        seconds = statistics.mean(row["seconds"] for row in found)
        print(
            f"| {name} | {len(scores)} | {mean:.2f}{spread} | {mean - float_accuracy:+.2f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
