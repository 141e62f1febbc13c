"""Projections of a residual stream keep 8 bits; what only looks like one does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.ir import meta
from sqakd_fx.program import build_program
from sqakd_fx.recipe.resolution import resolve_recipe


class Residual(nn.Module):
    """`shortcut` and `block` of one input, added, between a first and a last layer."""

    def __init__(self, shortcut: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.shortcut, self.block = shortcut, block
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.block(x) + self.shortcut(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def block(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), *more
    )


class Inverted(nn.Module):
    """A narrow layer whose own output goes on as the stream (MobileNetV2): it goes past nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.narrow = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(torch.relu(self.stem(x)))
        return self.head((x + self.block(x)).mean((2, 3)))  # type: ignore[no-any-return]


def bits_of(model: nn.Module, **fields: object) -> dict[str, tuple[int, int, str]]:
    """(weight bits, activation bits, source) of each layer by name."""
    recipe = resolve_recipe("w2a2", **fields)
    student = build_program(model.eval(), torch.zeros(2, 3, 12, 12), recipe).student
    settings = {n.name: meta.layer(n) for n in student.graph.nodes}
    return {n: (s.weight_bits, s.activation_bits, s.source) for n, s in settings.items() if s}


def one_pixel() -> nn.Module:
    return nn.Conv2d(4, 8, 1, 2)


@pytest.mark.parametrize(
    "shortcut",
    [
        one_pixel(),
        nn.Sequential(one_pixel(), nn.BatchNorm2d(8)),
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)),
    ],
    ids=["plain", "normalized", "averaged"],
)
@pytest.mark.parametrize("end", [(), (nn.BatchNorm2d(8),)], ids=["", "normalized"])
def test_a_projection_past_a_block_has_8_bits_and_the_block_has_its_own(
    shortcut: nn.Module, end: tuple[nn.Module, ...]
) -> None:
    found = bits_of(Residual(shortcut, block(*end)))
    apart = {n for n, (w, a, source) in found.items() if source.startswith("projections")}
    assert len(apart) == 1
    assert all(name.startswith("shortcut") for name in apart)
    assert all(found[name][:2] == (8, 8) for name in apart)
    assert all(s[:2] == (2, 2) for n, s in found.items() if n.startswith("block"))


def test_projections_can_have_the_bits_of_the_rest_or_stay_in_float() -> None:
    made = Residual(one_pixel(), block())
    assert bits_of(made, projections="same")["shortcut"][:2] == (2, 2)
    assert "shortcut" not in bits_of(made, projections="float")
    overridden = bits_of(made, override=[{"match": "shortcut", "weight_bits": 4}])
    assert overridden["shortcut"] == (4, 8, "override 'shortcut'")


@pytest.mark.parametrize(
    "model",
    [
        Inverted(),
        Residual(one_pixel(), nn.Conv2d(4, 8, 3, 2, 1)),
        Residual(nn.Conv2d(4, 8, 3, 2, 1), block()),
    ],
    ids=["stream starts behind it", "two parallel layers", "more than a pixel"],
)
def test_other_layers_in_front_of_a_sum_have_the_recipes_bits(model: nn.Module) -> None:
    assert not any(s.startswith("projections") for _, _, s in bits_of(model).values())


def test_the_papers_presets_leave_projections_as_they_are() -> None:
    assert resolve_recipe("paper/ewgs-w2a2").projections == "same"
