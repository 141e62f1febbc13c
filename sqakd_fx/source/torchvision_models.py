"""torchvision's models by name, with their default weights and the transform that these were trained with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sqakd_fx.source.transform import Transform


@dataclass(frozen=True)
class Pretrained:
    """A model, the transform of its weights where they have one, and what a user is told."""

    model: nn.Module
    transform: Transform | None
    note: str


def torchvision_default(factory: Any) -> Pretrained | None:
    """The model that a builder of torchvision makes, with default weights; None where `factory` is no such builder.

    Where the weights cannot be had they are random, and the note warns of it.
    """
    models = sys.modules.get("torchvision.models")
    name = getattr(factory, "__name__", "")
    if models is None or not str(getattr(factory, "__module__", "")).startswith("torchvision."):
        return None
    if name not in models.list_models() or models.get_model_builder(name) is not factory:
        return None
    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    return None if weights is None else _loaded(name, factory, weights)


def _loaded(name: str, factory: Callable[..., nn.Module], weights: Any) -> Pretrained:
    try:
        model = factory(weights=weights)
    except (OSError, RuntimeError) as error:
        note = (
            f"WARNING: the weights are random, because torchvision's {weights} cannot be had "
            f"({type(error).__name__}): give trained ones with --weights"
        )
        return Pretrained(factory(weights=None), None, note)
    return Pretrained(model, _transform(weights), f"{name} with torchvision's {weights}")


def _transform(weights: Any) -> Transform | None:
    preset = weights.transforms()
    if not all(hasattr(preset, key) for key in ("mean", "std", "resize_size", "crop_size")):
        return None
    crop, (side, *_) = preset.crop_size[0], preset.resize_size
    return Transform(
        crop_share=crop / side,
        mean=tuple(map(float, preset.mean)),
        std=tuple(map(float, preset.std)),
    )
