"""What finding the ranges of ResNet-18's weights costs, and what it costs in error.

    python benchmarks/initialization.py [--bits 4] [--repeats 3]

Prints seconds (the best of the repeats, on as many threads as torch has) and the mean square error of each
method as a multiple of the least one: an exhaustive search over 96 ranges a channel on all values. Weights
are drawn as torchvision initializes them; no download, no torchvision.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from sqakd_fx.quant.init_ranges import starting_range
from sqakd_fx.quant.levels import Levels
from sqakd_fx.quant.quantizer import Quantizer

_RATIOS = torch.linspace(1.0, 0.05, 96)


def resnet18_weights() -> list[Tensor]:
    """Weights of the convolutions and of the last layer, normal with the fan-out of He (2015)."""
    shapes = [(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4]
    for inputs, outputs in ((64, 128), (128, 256), (256, 512)):
        shapes += [(outputs, inputs, 3, 3), *[(outputs, outputs, 3, 3)] * 3]
        shapes += [(outputs, inputs, 1, 1)]
    generator = torch.Generator().manual_seed(0)
    convolutions = [
        torch.randn(shape, generator=generator) * math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
        for shape in shapes
    ]
    bound = 1 / math.sqrt(512)
    return [*convolutions, (torch.rand(1000, 512, generator=generator) * 2 - 1) * bound]


def errors(rows: Tensor, clip: Tensor, levels: Levels) -> Tensor:
    """Mean square error of every row (channels, values) at clips of shape (channels, 1)."""
    scale = clip / levels.magnitude
    q = torch.round(rows / scale + levels.half).clamp(levels.lowest, levels.lowest + levels.span)
    return ((q - levels.half) * scale - rows).square().mean(dim=1)


def least_errors(rows: Tensor, levels: Levels) -> Tensor:
    parts = []
    for part in rows.split(16):
        largest = part.abs().amax(dim=1, keepdim=True)
        found = torch.stack([errors(part, r * largest, levels) for r in _RATIOS])
        parts.append(found.amin(dim=0))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    weights = resnet18_weights()
    quantizers = [Quantizer("lsq", "weight", chosen.bits, channels=len(w), axis=0) for w in weights]
    least = sum(
        float(least_errors(w.flatten(1), q.levels).sum()) for w, q in zip(weights, quantizers)
    )
    print(f"ResNet-18, {sum(len(w) for w in weights)} channels, {chosen.bits} bits, ", end="")
    print(f"{torch.get_num_threads()} threads\n")
    print("| method | seconds | mean square error ÷ least |\n|---|---|---|")
    for method in ("minmax", "percentile", "mse"):
        seconds, total = math.inf, 0.0
        for _ in range(chosen.repeats):
            started = time.perf_counter()
            ranges = [
                starting_range(w, q.levels, q.side.initial_range, method)
                for w, q in zip(weights, quantizers)
            ]
            seconds = min(seconds, time.perf_counter() - started)
        for weight, quantizer, found in zip(weights, quantizers, ranges):
            clip = torch.maximum(-found.lower, found.upper).reshape(-1, 1)
            total += float(errors(weight.flatten(1), clip, quantizer.levels).sum())
        print(f"| {method} | {seconds:.2f} | {total / least:.4f} |")


if __name__ == "__main__":
    main()
