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
    weights = _default_weights(factory)
    return None if weights is None else _loaded(factory.__name__, factory, weights)


def torchvision_shape(factory: Any) -> tuple[int, ...] | None:
    """The shape of one image as the default weights of a builder of torchvision take it; None for other factories."""
    weights = _default_weights(factory)
    preset = None if weights is None else weights.transforms()
    # others take sizes of their own, or videos
    if preset is None or type(preset).__name__ != "ImageClassification":
        return None
    size = int(preset.crop_size[0])
    return (1, 3, size, size)


def _default_weights(factory: Any) -> Any:
    models = sys.modules.get("torchvision.models")
    name = getattr(factory, "__name__", "")
    if models is None or not str(getattr(factory, "__module__", "")).startswith("torchvision."):
        return None
    if name not in models.list_models() or models.get_model_builder(name) is not factory:
        return None
    return getattr(models.get_model_weights(name), "DEFAULT", None)


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
