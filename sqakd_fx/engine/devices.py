"""The device that a run computes on."""

from __future__ import annotations

import torch

from sqakd_fx.errors import RecipeError


def choose_device(wanted: str) -> torch.device:
    """ "auto" takes the GPU where there is one; raises RecipeError for a GPU that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "--device cuda: torch sees no GPU here: use --device cpu, or see `sqakd-fx doctor`"
        )
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)
