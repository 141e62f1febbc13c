"""The samples on which the file is farthest from the float model."""

from __future__ import annotations

import base64
import io

from PIL import Image

from sqakd_fx.report.held import Held
from sqakd_fx.report.markup import number, table, text
from sqakd_fx.results.farthest import FarSample
from sqakd_fx.results.shown_inputs import Numbers, Picture

_MODES = {1: "L", 3: "RGB"}
_LONGEST_SIDE = 256
_ENLARGED = 112
"""Pixels on the page of the longer side of an image."""


def sample_pictures(held: Held) -> str:
    """Each sample that is an image, with what both models say of it."""
    figures = "".join(map(_figure, held.report.farthest_samples))
    return f'<div class="samples">{figures}</div>' if figures else ""


def _figure(one: FarSample) -> str:
    source = _png(one.shown) if isinstance(one.shown, Picture) else None
    if source is None:
        return ""
    assert isinstance(one.shown, Picture)
    longest = max(one.shown.height, one.shown.width)
    height, width = (
        round(side * _ENLARGED / longest) for side in (one.shown.height, one.shown.width)
    )
    return (
        f'<figure><img src="data:image/png;base64,{source}" width="{width}" height="{height}" '
        f'alt="sample {one.index}"><figcaption>sample {one.index}<br>{text(_verdict(one))}</figcaption></figure>'
    )


def _verdict(one: FarSample) -> str:
    """What changes, in a few words."""
    if one.changed is not None and one.changed == 1 and one.positions:
        wanted, got = (
            max(zip(values, one.positions), default=(0.0, 0))[1]
            for values in (one.float_values, one.values)
        )
        return f"{wanted} → {got}" if wanted != got else "another"
    return f"error {one.relative_error:.1%}"


def _png(picture: Picture) -> str | None:
    """The image as PNG in base64; None where the pixels are not those of its size."""
    height, width, mode = picture.height, picture.width, _MODES.get(picture.channels)
    if mode is None or not (0 < height <= _LONGEST_SIDE and 0 < width <= _LONGEST_SIDE):
        return None
    try:
        pixels = base64.b64decode(picture.pixels, validate=True)
    except ValueError:
        return None
    if len(pixels) != height * width * picture.channels:
        return None
    file = io.BytesIO()
    Image.frombytes(mode, (width, height), pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def sample_table(held: Held) -> str:
    """One line a sample: its index, what changes, and the largest values of both models."""
    samples = held.report.farthest_samples
    numbers = any(isinstance(one.shown, Numbers) for one in samples)
    rows = [
        [
            number(one.index, "{:.0f}"),
            one.output,
            number(_percent(one.relative_error), "{:.2f}"),
            _changed(one),
            *([_input(one)] if numbers else []),
            _values(one),
        ]
        for one in samples
    ]
    titles = ["sample", "output", "relative error, %", "prediction", *["input"] * numbers]
    return table([*titles, "position: float → file"], rows)


def _percent(share: float) -> float:
    return 100 * share


def _changed(one: FarSample) -> str:
    if one.changed is None:
        return "–"
    if one.changed == 0:
        return "same"
    return "another" if one.changed == 1 else f"{one.changed:.2%} others"


def _input(one: FarSample) -> str:
    """The sizes of an input, its range, its mean and its first values."""
    if not isinstance(one.shown, Numbers):
        return "–"
    shown = one.shown
    sizes = "×".join(map(str, shown.shape)) or "a number"
    values = ", ".join(f"{value:.3g}" for value in shown.values)
    return f"{sizes}; {shown.lowest:.3g} to {shown.highest:.3g}, mean {shown.mean:.3g}; {values}"


def _values(one: FarSample) -> str:
    found = zip(one.positions, one.float_values, one.values)
    return ";  ".join(f"{at}: {wanted:.4g} → {got:.4g}" for at, wanted, got in found)
