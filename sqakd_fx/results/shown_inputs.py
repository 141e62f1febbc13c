"""An input as a report shows it: an image in few pixels, or numbers."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_LONGEST_SIDE = 64
_FEWEST_PIXELS = 4
_VALUES = 12


@dataclass(frozen=True)
class Picture:
    """An image of at most 64×64 pixels, from its darkest value to its brightest.

    Attributes:
        channels: 1 (grey) or 3 (red, green, blue).
        pixels: bytes in base64, row by row, the channels of a pixel side by side.
    """

    channels: int
    height: int
    width: int
    pixels: str


@dataclass(frozen=True)
class Numbers:
    """An input that is no image: its sizes, its range and its first values."""

    shape: tuple[int, ...]
    lowest: float
    mean: float
    highest: float
    values: tuple[float, ...]


def shown_input(sample: Tensor) -> Picture | Numbers | None:
    """One sample, without its batch axis; None where it has no values."""
    if not sample.numel():
        return None
    values = torch.nan_to_num(sample.detach().cpu().float())
    is_image = (
        sample.is_floating_point()
        and sample.ndim == 3
        and sample.shape[0] in (1, 3)
        and min(sample.shape[1:]) >= _FEWEST_PIXELS
    )
    return _picture(values) if is_image else _numbers(values)


def _picture(values: Tensor) -> Picture:
    scale = min(1.0, _LONGEST_SIDE / max(values.shape[1:]))
    height, width = (max(1, round(side * scale)) for side in values.shape[1:])
    small = F.interpolate(values[None], (height, width), mode="area")[0]
    spread = (small.max() - small.min()).clamp_min(1e-12)
    bytes_ = ((small - small.min()) / spread * 255).round().to(torch.uint8).permute(1, 2, 0)
    pixels = base64.b64encode(bytes_.contiguous().numpy().tobytes()).decode()
    return Picture(values.shape[0], height, width, pixels)


def _numbers(values: Tensor) -> Numbers:
    return Numbers(
        tuple(values.shape),
        float(values.min()),
        float(values.mean()),
        float(values.max()),
        tuple(values.flatten()[:_VALUES].tolist()),
    )
