"""Images of bytes, and the floats that a file makes of them before anything else: (x / scale - mean) / std."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sqakd_fx.errors import RecipeError
from sqakd_fx.recipe.input_patterns import inputs_called
from sqakd_fx.recipe.keys import Preprocess

PREPROCESS_KEY = "sqakd_fx.preprocess"
"""Of a file's metadata: what it does to which input."""
TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def preprocess_by_input(
    wanted: Mapping[str, Preprocess], inputs: Mapping[str, Tensor]
) -> dict[str, Preprocess]:
    """What the file does to each input that is given as bytes; `inputs` are the example's.

    Raises:
        RecipeError: no input is called so, or it is no batch of images with as many channels as means.
    """
    found: dict[str, Preprocess] = {}
    for pattern, one in wanted.items():
        for name in inputs_called(pattern, inputs, "preprocess"):
            _require_images(name, inputs[name], one)
            found[name] = one
    return found


def _require_images(name: str, x: Tensor, wanted: Preprocess) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise RecipeError(
            f"preprocess is for images of floats with 4 axes, and {name!r} has {x.ndim} axes of "
            f"{str(x.dtype).removeprefix('torch.')}: leave it out"
        )
    for key, values in (("mean", wanted.mean), ("std", wanted.std)):
        if len(values) not in (1, x.shape[1]):
            raise RecipeError(
                f"preprocess has {len(values)} numbers of {key} for {name!r}, which has {x.shape[1]} channels: give "
                f"{x.shape[1]}, or one for all"
            )


def floats_of(images: Tensor, how: Preprocess) -> Tensor:
    """What a file must make of images of bytes, as loaders of images do: float32, one operation after another."""
    x = images.permute(TO_NCHW) if how.layout == "nhwc" else images
    x = x.float() / how.scale
    mean, std = (
        torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (how.mean, how.std)
    )
    return (x - mean) / std


def bytes_of(x: Tensor, how: Preprocess) -> Tensor:
    """The images of bytes that lie nearest to floats in the model's form."""
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (how.mean, how.std))
    images = ((x * std + mean) * how.scale).round().clamp(0, 255).to(torch.uint8)
    return (images.permute(TO_NHWC) if how.layout == "nhwc" else images).contiguous()


def as_text(by_input: Mapping[str, Preprocess]) -> str:
    """`by_input` as a file's metadata holds it."""
    return json.dumps({name: one.model_dump(mode="json") for name, one in by_input.items()})


def of_metadata(metadata: Mapping[str, Any]) -> dict[str, Preprocess]:
    """What a file says that it does, by input; nothing where it says nothing that can be read."""
    try:
        said = json.loads(str(metadata.get(PREPROCESS_KEY, "{}")))
        return {str(name): Preprocess.model_validate(one) for name, one in said.items()}
    except (ValueError, AttributeError):
        return {}


def given_to(by_input: Mapping[str, Preprocess], name: str, x: Tensor) -> Tensor:
    """What a file gets for a tensor of the model's form: its bytes, where it takes bytes."""
    how = by_input.get(name)
    return x if how is None or not x.is_floating_point() else bytes_of(x, how)
