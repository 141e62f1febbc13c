"""What is done to an image before a model sees it: resize, crop, mean and standard deviation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sqakd_fx.diagnostics.wording import require_exists
from sqakd_fx.errors import SourceError
from sqakd_fx.storage import read_json


@dataclass(frozen=True)
class Transform:
    """Images are resized so that the short side has `resize` pixels and cropped in the centre to the model's size.

    Without `resize` the crop takes the share `crop_share` of the short side. Pixels in [0, 1] become (x - mean) / std.
    """

    resize: int | None = None
    crop_share: float = 1.0
    crop: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def sentence(self, height: int, width: int) -> str:
        """What happens to an image, in one line."""
        side = self.resize or round(max(height, width) / self.crop_share)
        short = f"to a short side of {side}"
        size = f"images are resized {short}, cropped in the centre to {height}×{width}"
        if self.mean is None and self.std is None:
            return f"{size}, in [0, 1]"
        return f"{size}, then (x - {_numbers(self.mean, 0)}) / {_numbers(self.std, 1)}"

    def check(self, channels: int, height: int, width: int) -> None:
        """Raise SourceError where it does not fit images of this size."""
        for option, values in (("--mean", self.mean), ("--std", self.std)):
            if values is not None and len(values) not in (1, channels):
                raise SourceError(
                    f"{option} has {len(values)} numbers and the model's images {channels} channels: give {channels}, "
                    "or one for all"
                )
        if self.std is not None and min(self.std) <= 0:
            raise SourceError(f"--std {_numbers(self.std, 1)} has a number that is not positive")
        if self.crop is not None and (self.crop, self.crop) != (height, width):
            raise SourceError(
                f"--crop {self.crop} is not the model's {height}×{width}: leave --crop out, or give --input-shape"
            )
        if not 0 < self.crop_share <= 1:
            raise SourceError(f"crop_pct {self.crop_share} of --transform is not between 0 and 1")
        most = max(height, width)
        if self.resize is not None and self.resize < most:
            raise SourceError(
                f"--resize {self.resize} is smaller than the model's {height}×{width}: give at least {most}"
            )

    def cropped(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The image in the model's size; its aspect ratio is kept."""
        scale = max(height / image.height, width / image.width) / self.crop_share
        if self.resize is not None:
            scale = self.resize / min(image.height, image.width)
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        resized = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        return resized.crop((left, top, left + width, top + height))

    def normalized(self, pixels: Tensor) -> Tensor:
        """(channels, height, width) in [0, 1] with mean and standard deviation taken off."""
        if self.mean is not None:
            pixels = pixels - torch.tensor(self.mean).reshape(-1, 1, 1)
        return pixels if self.std is None else pixels / torch.tensor(self.std).reshape(-1, 1, 1)


def _numbers(values: tuple[float, ...] | None, absent: float) -> str:
    return ", ".join(f"{value:g}" for value in values or (absent,))


NAMED: Mapping[str, Transform] = {
    "imagenet": Transform(crop_share=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "clip": Transform(
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
    ),
    "inception": Transform(mean=(0.5,), std=(0.5,)),
    "none": Transform(),
}
"""Transforms by name; "imagenet" is that of most classifiers of torchvision and timm: 256 and 224 pixels."""


def named_transform(name: str) -> Transform:
    """A transform by its name, or of a JSON file: a Hugging Face preprocessor_config.json, or timm's config.json.

    Raises:
        SourceError: no such name or file, or a file that says nothing of images.
    """
    if name in NAMED:
        return NAMED[name]
    if not name.endswith(".json"):
        raise SourceError(
            f"--transform {name!r} is unknown: choose {', '.join(NAMED)}, or give a preprocessor_config.json"
        )
    require_exists(Path(name), "--transform")
    values = read_json(Path(name))
    if not isinstance(values, dict):
        raise SourceError(f"--transform {name} is not a table: give a preprocessor_config.json")
    return _of_config(values.get("pretrained_cfg", values), name)


def _of_config(values: Mapping[str, Any], name: str) -> Transform:
    mean = values.get("image_mean", values.get("mean"))
    std = values.get("image_std", values.get("std"))
    if mean is None or std is None:
        raise SourceError(
            f"--transform {name} has neither image_mean with image_std nor mean with std: give --mean and --std"
        )
    size = values.get("size")
    resize = size.get("shortest_edge") if isinstance(size, dict) else None
    try:
        return Transform(
            None if resize is None else int(resize),
            float(values.get("crop_pct", 1.0)),
            mean=tuple(map(float, mean)),
            std=tuple(map(float, std)),
        )
    except (TypeError, ValueError):
        raise SourceError(
            f"--transform {name} has values that are not numbers: {json.dumps(mean)}, {json.dumps(std)}"
        ) from None
