"""Accuracy from real unlabelled images, from images made of BatchNorm's statistics, and from noise.

    python benchmarks/data_free.py [example|cifar10] [--seeds 3] [--out OUT]

Each gives W8A8 in 64 steps and W4A4 in 200 steps. Finished runs are kept in OUT and not run again. Prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from image_sets import IMAGE_SETS
from torch.utils.data import DataLoader, TensorDataset

from sqakd_fx.pipeline import run
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.source import Source, load_source
from sqakd_fx.source.synthetic import DataFree, synthetic_samples

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion" / "model.py"
STEPS = {"w8a8": 64, "w4a4": 200}
INPUTS = ("real", "made", "noise")


def source_of(name: str, folder: Path) -> Source:
    """A network with its unlabelled images and its labelled ones."""
    if name == "example":
        return load_source(str(EXAMPLE))
    images = IMAGE_SETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = images.read("train", folder)
    order = [x for x, _ in itertools.islice(images.epoch(pixels, labels, 0, 0), 40)]
    pixels, labels = images.read("test", folder)
    held = DataLoader(TensorDataset(images.normalized(pixels), labels), batch_size=250)
    net = images.teacher()
    example = (torch.zeros(2, *images.shape),)
    return Source(name, name, net, example, {}, torch.cat(order), held, None)


def with_inputs(source: Source, kind: str, seed: int, out: Path) -> Source:
    """The source with training data of a kind; made images are kept."""
    if kind == "real":
        return source
    shape, wanted = source.example_inputs[0].shape[1:], DataFree()
    if kind == "noise":
        noise = torch.randn(wanted.samples, *shape, generator=torch.Generator().manual_seed(seed))
        return replace(source, train_data=noise)
    path = out / f"made-{source.name}-{seed}.pt"
    if not path.exists():
        started = time.monotonic()
        made = synthetic_samples(source.model, source.example_inputs, wanted, seed=seed)
        print(f"{made.sentence}, {time.monotonic() - started:.0f} s", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        torch.save(made.samples, path)
    return replace(source, train_data=torch.load(path))


def report(source: Source, kind: str, bits: str, seed: int, out: Path) -> dict:
    """The report of one run, made where it is not there yet."""
    folder = out / f"{source.name}-{kind}-{bits}-seed{seed}"
    path = folder / "report.json"
    if not path.exists():
        recipe = resolve_recipe(bits, seed=seed, steps=STEPS[bits])
        run(with_inputs(source, kind, seed, out), recipe, folder, force=True)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=("example", "cifar10"), default="example")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("sqakd-out/benchmark-data-free"))
    options = parser.parse_args()
    source = source_of(options.name, options.out)
    found: dict[tuple[str, str], list[float]] = {}
    for seed, kind, bits in itertools.product(range(options.seeds), INPUTS, STEPS):
        accuracy = report(source, kind, bits, seed, options.out)["accuracy"]
        found.setdefault((kind, bits), []).append(accuracy["onnx"])
        print(f"seed {seed}, {kind}, {bits}: {accuracy['onnx']:.2f}", flush=True)
    print(
        f"\nfloat {accuracy['float']:.2f} %; mean ± standard deviation of {options.seeds} seeds\n"
    )
    print("| inputs | " + " | ".join(STEPS) + " |\n|---|" + "---|" * len(STEPS))
    for kind in INPUTS:
        print(f"| {kind} | " + " | ".join(words(found[kind, bits]) for bits in STEPS) + " |")


def words(scores: list[float]) -> str:
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}"


if __name__ == "__main__":
    main()
