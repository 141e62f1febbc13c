"""What a report shows of an input: an image keeps its shape, brightness and colours; others are numbers."""

from __future__ import annotations

import base64

import pytest
import torch

from sqakd_fx.results.shown_inputs import Numbers, Picture, shown_input


def test_an_image_keeps_its_aspect_ratio_and_goes_from_dark_to_bright() -> None:
    image = torch.linspace(-2, 3, 3 * 100 * 200).reshape(3, 100, 200)
    shown = shown_input(image)
    assert isinstance(shown, Picture)
    assert (shown.channels, shown.height, shown.width) == (3, 32, 64)
    pixels = base64.b64decode(shown.pixels)
    assert len(pixels) == 3 * 32 * 64
    assert (min(pixels), max(pixels)) == (0, 255)
    assert pixels[0] < pixels[1] < pixels[2], "red, green and blue of a pixel lie side by side"


def test_a_small_image_keeps_every_pixel() -> None:
    shown = shown_input(torch.tensor([[0.0, 1, 2, 3]] * 4)[None])
    assert isinstance(shown, Picture)
    assert list(base64.b64decode(shown.pixels))[:4] == [0, 85, 170, 255]


def test_an_image_of_one_value_is_dark() -> None:
    shown = shown_input(torch.full((1, 5, 5), 7.0))
    assert isinstance(shown, Picture)
    assert set(base64.b64decode(shown.pixels)) == {0}


@pytest.mark.parametrize("shape", [(5,), (2, 8, 8), (1, 2, 9), (1, 4, 4, 4), ()])
def test_other_inputs_are_numbers(shape: tuple[int, ...]) -> None:
    sample = torch.ones(shape) * 2
    shown = shown_input(sample)
    assert isinstance(shown, Numbers)
    assert shown.shape == shape
    assert (shown.lowest, shown.mean, shown.highest) == (2, 2, 2)
    assert 0 < len(shown.values) <= 12


def test_token_numbers_are_numbers_and_an_empty_sample_is_nothing() -> None:
    assert isinstance(shown_input(torch.ones(1, 8, 8, dtype=torch.int64)), Numbers)
    assert shown_input(torch.zeros(0, 3)) is None
