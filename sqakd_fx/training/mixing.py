"""Images mixed with one another, as more unlabelled inputs: teacher and student see the same mixture.

A teacher knows its training images better than any others, and a student that sees nothing else agrees with it
less on new ones. Mixtures need no labels, because the teacher answers for them.

    CutMix:  a box of the next image of the batch, of area 1 - λ and with its centre anywhere    (Yun 2019, eq. 1)
    mixup:   λ x + (1 - λ) x_next, λ at least 1/2                                                 (Zhang 2018)

λ is uniform in [0, 1] for every image. What is drawn depends on the seed and the step alone.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from sqakd_fx.recipe.keys import Recipe


def can_mix(inputs: tuple[Tensor, ...]) -> bool:
    """True where every tensor of a batch is images (N, C, H, W) in floating point."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return bool(tensors) and all(x.ndim == 4 and x.is_floating_point() for x in tensors)


def mixed(inputs: tuple[Tensor, ...], recipe: Recipe, step: int) -> tuple[Tensor, ...]:
    """The batch with every image mixed with the next one; every `mix_every`-th batch, else as it is."""
    if recipe.mixing == "none" or (step + 1) % recipe.mix_every:
        return inputs
    entropy = np.random.SeedSequence([recipe.seed % 2**64, step])
    chance = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
    size = next(len(x) for x in inputs if isinstance(x, Tensor))
    kept, across, down = torch.rand(3, size, 1, 1, 1, generator=chance)
    mix = (
        functools.partial(_mixup, kept=torch.maximum(kept, 1 - kept))
        if recipe.mixing == "mixup"
        else functools.partial(_cutmix, kept=kept, across=across, down=down)
    )
    return tuple(mix(x) if isinstance(x, Tensor) else x for x in inputs)


def _mixup(x: Tensor, kept: Tensor) -> Tensor:
    kept = kept.to(x)
    return kept * x + (1 - kept) * x.roll(1, 0)


def _cutmix(x: Tensor, kept: Tensor, across: Tensor, down: Tensor) -> Tensor:
    half = (1 - kept).sqrt() / 2  # of the image's sides
    height, width = x.shape[2:]
    y = ((torch.arange(height) + 0.5) / height).reshape(1, 1, -1, 1)
    z = ((torch.arange(width) + 0.5) / width).reshape(1, 1, 1, -1)
    inside = ((y - down).abs() < half) & ((z - across).abs() < half)
    return torch.where(inside.to(x.device), x.roll(1, 0), x)
