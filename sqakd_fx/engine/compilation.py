"""When training is worth compiling, whether it can be, and how torch is to do it."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable

import torch
import torch._functorch.config as functorch_config
from torch import fx

from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.keys import Recipe

_SAVED_ON_CPU = 5e-9, 0.0
_SAVED_ON_GPU = 2e-11, 7e-5
"""Seconds that compiling saves a step for every activation that is quantized and for every quantizer (2 CPU
cores; an H200, which runs what is not compiled as a recorded graph)."""
_COST = 1.2
"""Seconds that compiling takes for every quantizer (nothing in torch's cache)."""


def has_compiler(device: torch.device) -> bool:
    """True where torch.compile can build code: a C++ compiler on CPU, Triton on CUDA."""
    if device.type == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def wants_compiling(
    student: fx.GraphModule,
    recipe: Recipe,
    steps: int,
    samples: Callable[[], int],
    device: torch.device,
) -> bool:
    """Whether a run of `steps` steps is to be compiled: as the recipe says or, on "auto", where it pays.

    `samples` draws a batch to count it, and is called on "auto" alone.
    """
    if recipe.compile != "auto":
        return recipe.compile == "always"
    if recipe.deterministic and device.type == "cuda":
        return False  # the compiler times its kernels and takes the fastest
    return earns_compiling_back(student, steps, samples(), device)


def why_uncompiled(recipe: Recipe, device: torch.device) -> str | None:
    """What stands in the way of compiling, in a sentence."""
    if recipe.checkpoint_activations:
        return "checkpoint_activations: training runs uncompiled"
    if not has_compiler(device):
        return "no C++ compiler was found: training runs uncompiled, about half as fast"
    return None


def earns_compiling_back(
    student: fx.GraphModule, steps: int, batch: int, device: torch.device
) -> bool:
    """Whether a run of `steps` steps of `batch` samples saves more than compiling takes.

    The same at every start, so that a run that is resumed goes on as it began.
    """
    found = quantizers_of(student)
    activations = sum(
        math.prod((shape_of(node) or ())[1:])
        for node in student.graph.nodes
        if node.op == "call_module"
        and node.target in found
        and found[node.target].role == "activation"
    )
    by_activation, by_quantizer = _SAVED_ON_CPU if device.type == "cpu" else _SAVED_ON_GPU
    saved = batch * activations * by_activation + len(found) * by_quantizer
    return steps * saved > len(found) * _COST


def compiler_settings() -> contextlib.AbstractContextManager[None]:
    """Inside, torch compiles a student as suits it.

    What a quantizer gives a convolution is computed again for the backward pass, from what the quantizer
    was given, where torch would keep both. The compiled graphs are kept on disk for the next process.
    torch by itself leaves out those that hold an autograd function, as ours do, and traces them again. That
    is half of the seconds and a third of the memory of a start from a warm cache.
    """
    return functorch_config.patch(  # type: ignore[no-any-return]
        ban_recompute_materialized_backward=False,
        autograd_cache_allow_custom_autograd_functions=True,
    )
