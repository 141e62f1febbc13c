"""Learning rates: of which parameter, relative to what."""

from __future__ import annotations

import pytest
import torch
from conftest import ResidualNet

from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.optimizer import make_optimizer


def rates_of_ranges(*settings: str) -> list[tuple[str, float, float]]:
    """(parameter, its rate, its mean size) of all ranges of a small network at w2a2."""
    recipe = resolve_recipe("w2a2", settings=settings)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    student = build_program(ResidualNet().eval(), images, recipe).student
    calibrate(student, [(images,)])
    groups = make_optimizer(student, recipe).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    return [
        (name, rates[id(p)], float(p.detach().abs().mean()))
        for quantizer in quantizers_of(student).values()
        for name, p in quantizer.named_parameters(recurse=False)
        if p.requires_grad
    ]


def test_a_relative_rate_follows_the_size_of_a_range_to_the_nearest_power_of_two() -> None:
    found = rates_of_ranges("activation_family=ewgs", "quantizer_learning_rate=0.01")
    assert {name for name, *_ in found} == {"step", "lower", "upper"}
    for name, rate, size in [one for one in found if one[2] != 0]:
        assert 0.7 <= rate / (0.01 * size) <= 1.42, name


def test_an_end_of_a_range_at_zero_stays_there_at_a_relative_rate() -> None:
    ends = [one for one in rates_of_ranges("activation_family=ewgs") if one[2] == 0]
    assert ends  # behind ReLU
    for name, rate, _ in ends:
        assert name == "lower"
        assert rate < 1e-13


@pytest.mark.parametrize(
    ("weights", "activations", "shares"),
    [
        ("lsq", "pact", {"step": 1.0, "alpha": 0.1}),
        ("qil", "qil", {"center": 0.01, "distance": 0.01, "gamma": 0.01}),
    ],
)
def test_a_family_may_move_at_a_share_of_a_relative_rate_and_moves_at_the_whole_of_another(
    weights: str, activations: str, shares: dict[str, float]
) -> None:
    families = (f"weight_family={weights}", f"activation_family={activations}")
    settings = (*families, "quantizer_learning_rate=0.01")
    found = rates_of_ranges(*settings)
    assert {name for name, *_ in found} == set(shares)
    for name, rate, size in found:
        assert 0.7 <= rate / (0.01 * shares[name] * size) <= 1.42, name
    for _, rate, _ in rates_of_ranges(*settings, "quantizer_rate=absolute"):
        assert rate == pytest.approx(0.01)
