"""The optimizer of a student, and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sqakd_fx.errors import TrainingError
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.keys import Recipe


def make_optimizer(student: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Weights with decay, everything else without, quantizer parameters at their own rate.

    Raises:
        TrainingError: the student has no parameters.
    """
    shares = {
        id(p): q.side.share_of_rate
        for q in quantizers_of(student).values()
        for p in q.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    ranges: list[nn.Parameter] = []
    for parameter in student.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in shares:
            ranges.append(parameter)
        elif parameter.ndim > 1:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        {"params": plain, "lr": recipe.learning_rate, "weight_decay": 0.0},
        *_range_groups(ranges, shares, recipe),
    ]
    groups = [group | {"initial_lr": group["lr"]} for group in groups if group["params"]]
    if not groups:
        raise TrainingError("the student has no parameters to train: use --steps 0")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, fused=True)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, fused=True)


def _range_groups(
    ranges: list[nn.Parameter], shares: Mapping[int, float], recipe: Recipe
) -> list[dict[str, Any]]:
    """Groups of the ranges; a relative rate is one group for each power of two of their mean size.

    Adam moves every parameter by about its rate a step, so one rate for steps of 0.01 and of 1 is too
    fast for the first or too slow for the second. An end of a range that is 0, as behind ReLU, stays there.
    `shares` of that rate are by the id of a range.
    """
    rate = recipe.quantizer_learning_rate
    if recipe.quantizer_rate == "absolute":
        return [{"params": ranges, "lr": rate, "weight_decay": 0.0}]
    by_share: dict[float, list[nn.Parameter]] = {}
    for parameter in ranges:
        size = float(parameter.detach().abs().mean())
        power = round(math.log2(max(size, 1e-12)))
        by_share.setdefault(shares[id(parameter)] * 2.0**power, []).append(parameter)
    return [
        {"params": found, "lr": rate * share, "weight_decay": 0.0}
        for share, found in sorted(by_share.items())
    ]


def schedule(recipe: Recipe, step: int, total: int) -> float:
    """Learning-rate factor of a step: linear warm-up, then cosine to 0 or constant."""
    warm = int(recipe.warmup * total)
    if step < warm:
        return (step + 1) / warm
    if recipe.schedule == "constant":
        return 1.0
    done = (step - warm) / max(total - warm, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate: the recipe's times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
