"""Codes of weights keep within what x86 processors without VNNI add up, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.families import FAMILIES, Interval, affine, register
from sqakd_fx.quant.grid import decode
from sqakd_fx.quant.levels import LARGEST_SUM, largest_weight_code, weight_levels
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe

PRESETS = ("w8a8", "w7a8", "w4a8", "w8a4", "w4a4", "w2a2", "w1a1", "paper/pact-w8a8")


@pytest.fixture
def lopsided() -> Iterator[str]:
    """A registered family whose weight grid lies where the weights are, far from zero."""

    def interval(p: dict[str, Tensor], x: Tensor, levels: object) -> Interval:
        at = affine(x.detach().amin() - 9, x.detach().amax() + 0.1, levels)  # type: ignore[arg-type]
        return at._replace(lowest=at.lowest - 100)

    own = FAMILIES["minmax"]
    register(replace(own, name="lopsided", weight=replace(own.weight, interval=interval)))  # type: ignore[arg-type]
    yield "lopsided"
    del FAMILIES["lopsided"]


def assert_within(family: str, bits: int, per_channel: bool, zero: bool, largest: int) -> None:
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(bits)) / 5
    made = Quantizer(
        family,
        "weight",
        bits,
        channels=5 if per_channel else None,
        axis=0 if per_channel else None,
        zero_in_grid=zero,
        largest_code=largest,
    )
    made.initialize(w, "minmax")
    for factor in (1.0, 0.2, -0.5, 3.0):  # wherever training might take the parameters
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(factor)
        codes, grid = made.codes(w), made.grid(w)
        assert int(codes.abs().max()) <= largest
        assert max(-grid.qmin, grid.qmax) <= largest
        assert torch.equal(decode(codes, grid), made(w).detach() + 0.0)


@pytest.mark.parametrize("largest", [64, 127])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_leaves_the_largest_code(family: str, per_channel: bool, largest: int) -> None:
    for bits in range(1, 9):
        for zero in (True, False):
            assert_within(family, bits, per_channel, zero, largest)


def test_a_registered_family_does_not_leave_it_either(lopsided: str) -> None:
    for bits in range(1, 9):
        assert_within(lopsided, bits, False, True, 64)


def test_eight_bits_use_all_that_fits_on_both_sides() -> None:
    levels = weight_levels(8, largest_weight_code("reduced", 8), True, None)
    assert (levels.lowest, levels.lowest + levels.span) == (-64, 64)
    assert weight_levels(8, largest_weight_code("full", 8), True, None).lowest == -127


def test_a_grid_without_zero_gets_one_where_its_odd_codes_do_not_fit() -> None:
    halves = {bits: weight_levels(bits, 64, False, None).half for bits in range(1, 9)}
    assert halves == {**dict.fromkeys(range(1, 7), 0.5), 7: 0.0, 8: 0.0}
    assert weight_levels(7, 127, False, None).half == 0.5


def test_the_largest_code_is_the_last_whose_pairs_fit() -> None:
    for bits in range(1, 9):
        largest, activation = largest_weight_code("reduced", bits), 2**bits - 1
        assert 2 * activation * largest <= LARGEST_SUM
        assert largest == 127 or 2 * activation * (largest + 1) > LARGEST_SUM
        assert largest_weight_code("full", bits) == 127


def codes_by_layer(net: nn.Module, images: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Weight codes of the integer program."""
    program = build_program(net, images, recipe)
    calibrate(program.student, [(images,)], method=recipe.initialization)
    stored = dict(lower(program.student).graph_module.named_buffers())
    return {name: codes.int() for name, codes in stored.items() if codes.dtype == torch.int8}


def largest_code(codes: Tensor) -> int:
    return int(codes.abs().max())


def largest_pair(codes: Tensor) -> int:
    """Of two codes of one sign that some kernel adds, without the sign."""
    if codes.shape[1] % 2 and codes[0, 0].numel() > 1:
        return 2 * largest_code(codes)
    even = codes[:, : codes.shape[1] // 2 * 2]
    return max(int((even[:, ::2] + even[:, 1::2]).abs().max()), largest_code(codes))


@pytest.mark.parametrize("batch_norm", ["absorb", "fold"])
@pytest.mark.parametrize("bits", PRESETS)
@pytest.mark.parametrize("weight_range", ["paired", "reduced"])
def test_no_layer_of_a_preset_that_reads_eight_bits_overflows(
    residual_net: nn.Module, images: Tensor, bits: str, batch_norm: str, weight_range: str
) -> None:
    settings = [f"batch_norm={batch_norm}", f"weight_range={weight_range}"]
    found = codes_by_layer(residual_net, images, resolve_recipe(bits, settings=settings))
    eight = {name for name in found if bits.endswith("a8") or name.startswith(("conv.", "fc."))}
    eight |= {name for name in found if ".short." in name and not bits.startswith("paper")}
    assert all(255 * largest_pair(found[name]) <= LARGEST_SUM for name in eight)
    if weight_range == "reduced":
        assert all(largest_code(found[name]) <= 64 for name in eight)
    if bits == "w8a8":
        largest = {"paired": 100, "reduced": 64}[weight_range]
        assert max(largest_code(found[name]) for name in eight) >= largest
        assert max(map(largest_pair, found.values())) >= 120


def test_weights_that_meet_few_bits_keep_all_of_int8(
    residual_net: nn.Module, images: Tensor
) -> None:
    found = codes_by_layer(residual_net, images, resolve_recipe("w8a4"))
    assert largest_code(found["layers.0.conv1.weight"]) == 127
    assert largest_pair(found["layers.0.conv1.weight"]) > 128
    assert largest_pair(found["fc.weight"]) <= 128


def test_the_full_range_is_had_where_the_recipe_asks_for_it(
    residual_net: nn.Module, images: Tensor
) -> None:
    def largest(*settings: str) -> dict[str, int]:
        found = codes_by_layer(residual_net, images, resolve_recipe("w8a8", settings=settings))
        return {name: largest_code(codes) for name, codes in found.items()}

    assert set(largest("weight_range=full").values()) == {127}
    one = largest(
        "weight_range=reduced", 'override=[{match="layers.0.conv1", weight_range="full"}]'
    )
    assert [name for name, code in one.items() if code > 64] == ["layers.0.conv1.weight"]


class CalledTwice(nn.Module):
    """One weight that meets 4 bits first and 8 bits last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.relu(self.inner(torch.relu(self.first(x)))))


def test_a_shared_weight_fits_with_the_widest_activations_that_it_meets() -> None:
    torch.manual_seed(0)
    found = codes_by_layer(CalledTwice().eval(), torch.randn(8, 6), resolve_recipe("w8a4"))
    assert set(found) == {"first.weight", "inner.weight"}
    assert all(largest_pair(codes) <= 128 for codes in found.values())
    recipe = resolve_recipe("w8a4", settings=["weight_range=reduced"])
    found = codes_by_layer(CalledTwice().eval(), torch.randn(8, 6), recipe)
    assert [largest_code(codes) for codes in found.values()] == [64, 64]
