"""When training is worth compiling, and whether it can be."""

from __future__ import annotations

import shutil

import torch

from sqakd_fx.recipe import Recipe

_COMPILE_FROM_STEPS = 600


def has_compiler(device: torch.device) -> bool:
    """True where torch.compile can build code: a C++ compiler on CPU, Triton on CUDA."""
    if device.type == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def wants_compilation(recipe: Recipe, steps: int) -> bool:
    """Whether the recipe has `steps` steps compiled."""
    return recipe.compile == "always" or (recipe.compile == "auto" and steps >= _COMPILE_FROM_STEPS)
