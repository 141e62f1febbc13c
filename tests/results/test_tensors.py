"""What is recorded of each quantized tensor agrees with its quantizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sqakd_fx
from sqakd_fx.program import Program
from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.results.tensors import tensor_facts

IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def calibrated(**settings: object) -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).eval()
    recipe = sqakd_fx.resolve_recipe("w4a4", **settings)
    program = sqakd_fx.build_program(net, IMAGES[:2], recipe)
    sqakd_fx.calibrate(program, IMAGES)
    program.student.eval()
    return program


def test_every_quantizer_is_there_with_its_grid_and_all_values_counted() -> None:
    program = calibrated()
    found = tensor_facts(program, (IMAGES,))
    quantizers = quantizers_of(program.student)
    assert {one.quantizer for one in found} == set(quantizers)
    for one in found:
        quantizer = quantizers[one.quantizer]
        assert (one.bits, one.role) == (quantizer.bits, quantizer.role)
        assert one.levels == quantizer.levels.span + 1
        assert sum(one.counts) > 0
        assert one.start <= one.lowest < one.end
        assert 0 <= one.clipped < 0.5
    images = next(one for one in found if one.role == "activation")
    assert sum(images.counts) == IMAGES[:8].numel()


def test_the_noise_of_a_grid_is_that_of_its_quantizer() -> None:
    program = calibrated()
    found = tensor_facts(program, (IMAGES,))
    first = next(one for one in found if one.role == "activation")
    x = IMAGES[:8]
    noise = (quantizers_of(program.student)[first.quantizer](x) - x).square().sum()
    assert first.grid_noise == pytest.approx(10 * math.log10(x.square().sum() / noise), abs=1e-3)
    assert first.distance == pytest.approx(first.grid_noise, abs=1e-3)


def test_a_tensor_behind_others_is_farther_from_float_than_its_own_grid_explains() -> None:
    found = tensor_facts(calibrated(), (IMAGES,))
    last = [one for one in found if one.role == "activation"][-1]
    assert last.distance is not None
    assert last.grid_noise is not None
    assert last.distance < last.grid_noise


def test_tensors_whose_channels_were_rescaled_are_not_held_against_float() -> None:
    found = tensor_facts(calibrated(equalize="activations"), (IMAGES,))
    assert {one.distance for one in found} == {None}
    assert any(one.grid_noise is not None for one in found)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_grid_of_every_family_holds_most_of_its_weights(family: str) -> None:
    for one in tensor_facts(calibrated(weight_family=family), (IMAGES,)):
        assert one.levels >= 2
        assert one.step > 0
        assert one.clipped < 0.6
        assert sum(one.counts) > 0


def test_a_large_network_is_measured_on_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqakd_fx.results.tensors._MOST_ELEMENTS", 2 * 64)
    images = next(one for one in tensor_facts(calibrated(), (IMAGES,)) if one.role == "activation")
    assert sum(images.counts) == 64


def test_a_quantizer_that_is_off_has_no_grid_to_show() -> None:
    program = calibrated()
    for quantizer in quantizers_of(program.student).values():
        quantizer.enabled = False
    assert tensor_facts(program, (IMAGES,)) == []
