"""No training, however hostile, kills a range: it stays finite and positive, and its output has levels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.quant.quantizer import Quantizer

HOSTILE = {
    "up": torch.ones_like,
    "down": lambda y: -torch.ones_like(y),
    "apart": lambda y: -torch.sign(y) - 1e-3,
    "together": lambda y: torch.sign(y) + 1e-3,
    "noise": torch.randn_like,
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
}
STEPS = 120


def mistreated(made: Quantizer, x: Tensor, hostile: str, optimizer: str) -> None:
    """Hundreds of large steps that all push the same way, then as many the other way."""
    steps = OPTIMIZERS[optimizer](made.parameters())
    for step in range(STEPS):
        steps.zero_grad()
        y = made(x)
        sign = 100.0 if step < STEPS // 2 else -100.0
        y.backward(sign * HOSTILE[hostile](y.detach()))
        steps.step()


def has_survived(made: Quantizer, x: Tensor) -> None:
    assert all(bool(torch.isfinite(p).all()) for p in made.parameters())
    scale = made.grid(x).scale
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    assert bool(torch.isfinite(made(x)).all())
    farthest = max([1.0, *(float(p.detach().abs().max()) for p in made.parameters())])
    probe = 2.0**made.bits * farthest * torch.linspace(-1, 1, 400)
    for row in made(probe.expand(made.channels or 1, -1)).detach():
        assert len(torch.unique(row)) > 1, made.values


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("family", "role"),
    [
        (name, role)
        for name, family in FAMILIES.items()
        for role in ("weight", "signed activation", "unsigned activation")
        if (family.weight if role == "weight" else family.activation).learned
    ],
)
def test_a_range_survives_hostile_gradients(family: str, role: str, optimizer: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    x = x / 10 if role == "weight" else x.abs() if role.startswith("unsigned") else x
    for hostile, bits in zip(HOSTILE, itertools.cycle((1, 4))):
        channels = 3 if role == "weight" else None
        made = Quantizer(family, role.split()[-1], bits, channels=channels, axis=0)
        made.initialize(x, "paper")
        mistreated(made, x, hostile, optimizer)
        has_survived(made, x)
