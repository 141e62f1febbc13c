"""8-bit activations of a target that knows zero point 0 alone have signed codes, whatever the family says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.quant.grid import decode, encode
from sqakd_fx.quant.quantizer import Quantizer


def _data(kind: str) -> Tensor:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    return {"positive": x.abs(), "both": x, "mostly positive": x + 2}[kind]


@pytest.mark.parametrize("kind", ["positive", "both", "mostly positive"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_signed_grid_is_about_zero_and_is_what_is_computed(family: str, kind: str) -> None:
    x = _data(kind).requires_grad_()
    quantizer = Quantizer(family, "activation", 8, signed=True)
    quantizer.initialize(x, "minmax")
    grid = quantizer.grid()
    assert (grid.zero_point, grid.qmin, grid.qmax) == (128, 0, 255)
    assert torch.equal(quantizer(x), decode(encode(x, grid), grid))
    assert torch.equal(quantizer.codes(x), encode(x, grid))
    if family not in ("lsq", "ewgs"):  # their gains and steps are scaled in the backward
        values = x.detach()
        reach = max(float(-values.min()) / 128, float(values.max()) / 127)
        assert float(grid.scale) == pytest.approx(reach, rel=0.02)
    quantizer(x).square().sum().backward()
    assert x.grad is not None
    gradients = [x.grad, *(p.grad for p in quantizer.parameters() if p.grad is not None)]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert len(gradients) == 1 + len(quantizer.side.learned)


def test_values_of_one_sign_use_seven_bits_of_a_signed_grid() -> None:
    x = _data("positive")
    signed, seven = (
        Quantizer("lsq", "activation", 8, signed=True),
        Quantizer("lsq", "activation", 7),
    )
    for quantizer in (signed, seven):
        quantizer.initialize(x, "mse")
    assert torch.allclose(signed(x), seven(x), atol=1e-6)


def test_fewer_bits_and_weights_have_the_grids_that_they_have_without() -> None:
    x = _data("positive")
    for role, bits in (("activation", 4), ("activation", 7), ("weight", 8)):
        both = [Quantizer("lsq", role, bits, signed=signed) for signed in (False, True)]
        for quantizer in both:
            quantizer.initialize(x, "minmax")
        plain, signed = (quantizer.grid(x) for quantizer in both)
        assert plain.same_as(signed)
        assert (plain.qmin, plain.qmax) == (signed.qmin, signed.qmax)
