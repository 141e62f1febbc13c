"""Depthwise layers, whose channels have few weights each, have 8 bits in presets of fewer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sqakd_fx.program import build_program, layer_facts
from sqakd_fx.recipe.resolution import resolve_recipe

IMAGES = torch.randn(4, 3, 16, 16)


def separable() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(16 * 256, 5),
    ).eval()


def bits_of(preset: str, **settings: str) -> dict[str, tuple[int, int]]:
    program = build_program(separable(), IMAGES, resolve_recipe(preset, **settings))
    return {f.name: (f.weight_bits, f.activation_bits) for f in layer_facts(program.student)}


@pytest.mark.parametrize(
    ("preset", "inner"), [("w4a8", (4, 8)), ("w4a4", (4, 4)), ("w2a2", (2, 2))]
)
def test_the_depthwise_layer_alone_has_8_bits(preset: str, inner: tuple[int, int]) -> None:
    found = bits_of(preset)
    assert found["2"] == (8, 8)
    assert found["4"] == found["6"] == inner


def test_a_recipe_gives_it_the_bits_of_the_rest_or_leaves_it_in_float() -> None:
    assert bits_of("w4a4", depthwise="same")["2"] == (4, 4)
    assert "2" not in bits_of("w4a4", depthwise="float")


def test_the_papers_presets_leave_it_as_it_is() -> None:
    assert bits_of("paper/lsq-w4a4")["2"] == (4, 4)
