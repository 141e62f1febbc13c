"""Layers in integers beside float: milliseconds a call in ONNX Runtime, and whether the file computes what was trained.

    python benchmarks/layer_forms.py [GLOB ...] [--runs 15]

Each form stands behind a 1×1 convolution with ReLU and in front of another, as in a network, so that its input and
its output are on a grid. One thread, default sessions, medians of CPU time; the integer file (W8A8, container) and the
float one take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from chosen import chosen
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.program import build_program, lower
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.runtime.session import session
from sqakd_fx.stages import calibrate
from sqakd_fx.validation.validate import validate


class Between(nn.Module):
    """A layer between two convolutions, all channels and the same size in front of it."""

    def __init__(self, layer: Callable[[Tensor], Tensor], channels: int, outputs: int) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv2d(4, channels, 1), layer
        self.last = nn.Conv2d(outputs, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(torch.relu(self.first(x))))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class LearnedAffine(nn.Module):
    """One factor and one summand for all channels behind an activation, in front of a depthwise convolution."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(64, 64, 1), _conv(64, 64, 3, 64)
        self.activation = activation
        self.a, self.b = (nn.Parameter(torch.tensor([x])) for x in (1.5, 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x) * self.a + self.b) * self.a + self.b)


def _conv(inputs: int, outputs: int, kernel: int, groups: int = 1, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)


def _padded(mode: str, value: float = 0.0) -> nn.Module:
    """A Pad as importers write it, in front of a convolution that does not pad."""
    if mode == "constant":
        pad = Function(lambda x: F.pad(x, (1, 1, 1, 1), value=value))
    else:
        pad = Function(lambda x: F.pad(x, (1, 1, 1, 1), mode=mode))
    return nn.Sequential(pad, nn.Conv2d(64, 64, 3, groups=64), nn.ReLU())


Form = tuple[Callable[[], nn.Module], int, int, int]
"""What makes the layer, its input channels, its output channels, height and width."""

FORMS: dict[str, Form] = {
    "depthwise 3×3": (lambda: _conv(64, 64, 3, 64), 64, 64, 56),
    "multiplier 2, 3×3": (lambda: _conv(64, 128, 3, 64), 64, 128, 56),
    "multiplier 2, 7×7, stride 2": (lambda: _conv(64, 128, 7, 64, 2), 64, 128, 56),
    "multiplier 3, 3×3": (lambda: _conv(32, 96, 3, 32), 32, 96, 14),
    "multiplier 8, 3×3": (lambda: _conv(8, 64, 3, 8), 8, 64, 56),
    "depthwise transposed 2×2": (
        lambda: nn.ConvTranspose2d(64, 64, 2, 2, groups=64),
        64,
        64,
        28,
    ),
    "depthwise transposed 4×4": (
        lambda: nn.ConvTranspose2d(64, 64, 4, 2, 1, groups=64),
        64,
        64,
        28,
    ),
    "32 groups of 4": (lambda: _conv(128, 128, 3, 32), 128, 128, 28),
    "16 groups of 4": (lambda: _conv(64, 64, 3, 16), 64, 64, 56),
    "32 groups of 8": (lambda: _conv(256, 256, 3, 32), 256, 256, 14),
    "32 groups of 16": (lambda: _conv(512, 512, 3, 32), 512, 512, 7),
    "8 groups of 6": (lambda: _conv(48, 48, 3, 8), 48, 48, 28),
    "1×1, 3 groups of 16": (lambda: _conv(48, 240, 1, 3), 48, 240, 28),
    "zero padding in front": (lambda: _padded("constant"), 64, 64, 56),
    "reflect padding in front": (lambda: _padded("reflect"), 64, 64, 56),
    "replicate padding in front": (lambda: _padded("replicate"), 64, 64, 56),
    "PReLU": (lambda: nn.PReLU(64), 64, 64, 56),
    "hard-swish": (lambda: nn.Hardswish(), 64, 64, 56),
    "hard-swish, spelt out": (
        lambda: Function(lambda x: x * torch.clamp(x + 3, 0, 6) / 6),
        64,
        64,
        56,
    ),
    "SiLU": (lambda: nn.SiLU(), 64, 64, 56),
    "SiLU, spelt out": (lambda: Function(lambda x: x * torch.sigmoid(x)), 64, 64, 56),
    "GLU behind 1×1": (
        lambda: nn.Sequential(nn.Conv2d(64, 128, 1), nn.GLU(1)),
        64,
        64,
        56,
    ),
    "GroupNorm": (lambda: nn.GroupNorm(8, 64), 64, 64, 56),
    "learned affine behind hard-swish": (lambda: LearnedAffine(nn.Hardswish()), 64, 64, 56),
    "hard-sigmoid": (lambda: nn.Hardsigmoid(), 64, 64, 56),
    "hard-sigmoid, spelt out": (
        lambda: Function(lambda x: torch.clamp(x + 3, 0, 6) / 6),
        64,
        64,
        56,
    ),
}


def paths_of(form: Form, folder: Path) -> tuple[Sequence[Path], Tensor, bool]:
    """The integer and the float file, an input, and whether the integer file computes what was trained."""
    make, channels, outputs, size = form
    torch.manual_seed(0)
    model, x = Between(make(), channels, outputs).eval(), torch.randn(2, 4, size, size)
    program = build_program(model, x, resolve_recipe("w8a8"))
    calibrate(program, x)
    lowered = lower(program.student).graph_module
    integer = export(program, lowered, folder / "integer.onnx").path
    real = export(program, lowered, folder / "float.onnx", profile="float").path
    exact = not validate(program.student, lowered, integer, [(x,)]).failures
    return (integer, real), x[:1], exact


def medians(paths: Sequence[Path], x: Tensor, runs: int) -> list[float]:
    """Milliseconds of CPU time a call, of sessions that take turns."""
    running = [session(path, threads=1) for path in paths]
    feeds = [{one.get_inputs()[0].name: x.numpy()} for one in running]
    times: list[list[float]] = [[] for _ in paths]
    for turn in range(runs + 2):
        for one, feed, seen in zip(running, feeds, times, strict=True):
            started = time.process_time()
            one.run(None, feed)
            if turn >= 2:
                seen.append(time.process_time() - started)
    return [1000 * float(np.median(seen)) for seen in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("globs", nargs="*", default=["*"])
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| form | integer (ms) | float (ms) | ÷ float | exact |\n|---|---|---|---|---|")
    for name in chosen(FORMS, options.globs):
        form = FORMS[name]
        with tempfile.TemporaryDirectory() as folder:
            paths, x, exact = paths_of(form, Path(folder))
            integer, real = medians(paths, x, options.runs)
        told = "yes" if exact else "NO"
        print(
            f"| {name} | {integer:.2f} | {real:.2f} | {integer / real:.2f} | {told} |", flush=True
        )


if __name__ == "__main__":
    main()
