"""Exported networks in sessions with default options and with exact products, beside the static proof."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from awkward_models import AWKWARD
from common_models import MODELS
from conftest import EXAMPLE, ResidualNet, with_lively_batch_norm
from emulated import EMULATOR, emulated_outputs
from torch import nn

from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export_job
from sqakd_fx.runtime.session import session
from sqakd_fx.source.source import load_source
from sqakd_fx.validation.pair_sums import pair_sums


def the_example() -> tuple[nn.Module, tuple[Any, ...]]:
    source = load_source(str(EXAMPLE))
    return source.model, (torch.cat([batch[0] for batch in source.eval_data])[:32],)


def residual() -> tuple[nn.Module, tuple[Any, ...]]:
    return with_lively_batch_norm(ResidualNet(), (1, 3, 16, 16)), (torch.randn(16, 3, 16, 16),)


def common(name: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    return lambda: (MODELS[name][0](), MODELS[name][1])


def awkward(name: str) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    return lambda: (AWKWARD[name][0](), (AWKWARD[name][1],))


def depthwise(axes: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """Depthwise layers of several kernels, strides, dilations and multipliers, along so many axes."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    layers = [
        conv(3, 16, 1),
        nn.ReLU(),
        conv(16, 16, 3, padding=1, groups=16),
        nn.ReLU(),
        conv(16, 32, 3, padding=2, dilation=2, groups=16),
        nn.ReLU(),
        conv(32, 32, 5, 2, 2, groups=32),
        nn.ReLU(),
        conv(32, 8, 1),
    ]
    return nn.Sequential(*layers), (torch.randn(4, 3, *[9] * axes),)


NETWORKS = {
    **{f"depthwise, {n} axes": functools.partial(depthwise, n) for n in (1, 2, 3)},
    "the example": the_example,
    "residual": residual,
    **{name: common(name) for name in ("attention", "attention by hand", "functional", "shared")},
    **{name: common(name) for name in ("u-net", "masked")},
    **{name: awkward(name) for name in ("mixed", "patches", "norms", "cells", "spectrogram")},
}


def feeds(path: Path, inputs: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """Inputs by their names in the file."""
    return {i.name: x.numpy() for i, x in zip(session(path).get_inputs(), inputs, strict=True)}


def outputs(path: Path, inputs: tuple[Any, ...], exact_products: bool) -> list[np.ndarray]:
    return session(path, exact_products=exact_products).run(None, feeds(path, inputs))


@dataclass(frozen=True)
class Compared:
    """One file: whether both sessions give the same bits, and what the static proof finds.

    `emulated` says the same of the first session on an emulated processor without VNNI; None without an emulator.
    """

    are_equal: bool
    emulated: bool | None
    overflows: bool
    largest_weights: int
    largest: int


def exported(
    name: str, bits: str, profile: str, folder: Path, weight_range: str = "paired"
) -> tuple[Path, tuple[Any, ...]]:
    """A network of random weights that was calibrated and exported, and its inputs."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    recipe = resolve_recipe(bits, settings=[f"weight_range={weight_range}"])
    program = build_program(model.eval(), inputs, recipe)
    example = program.traced.call.flatten(inputs, {})
    calibrate(program.student, [example], method="minmax")
    job = export_job(lower(program.student).graph_module, program)
    return write_profile(profile, job, folder / "model.onnx").path, example


def compared(name: str, bits: str, profile: str, folder: Path) -> Compared:
    """One network's file, run both ways."""
    path, example = exported(name, bits, profile, folder)
    plain, exact = (outputs(path, example, one) for one in (False, True))
    found = pair_sums(path)
    assert found
    emulated = None
    if EMULATOR is not None:
        ran = emulated_outputs(path, feeds(path, example))
        emulated = all(map(np.array_equal, ran, exact))
    return Compared(
        all(np.array_equal(a, b) for a, b in zip(plain, exact, strict=True)),
        emulated,
        any(pair.overflows for pair in found),
        max(pair.weights for pair in found),
        max(pair.largest for pair in found),
    )
