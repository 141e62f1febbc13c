"""When training is worth compiling, whether it can be, and what of it the next run finds again."""

from __future__ import annotations

import contextlib
import shutil

import torch
import torch._functorch.config as functorch_config

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


def compiler_settings() -> contextlib.AbstractContextManager[None]:
    """Inside, torch compiles a student as suits it.

    What a quantizer gives a convolution is computed again for the backward pass, from what the quantizer
    was given, where torch would keep both. And the compiled graphs are kept on disk for the next process:
    torch leaves out those that hold an autograd function, as ours do, and would trace them again, which is
    half of the seconds and a third of the memory of a start from a warm cache.
    """
    return functorch_config.patch(  # type: ignore[no-any-return]
        ban_recompute_materialized_backward=False,
        autograd_cache_allow_custom_autograd_functions=True,
    )
