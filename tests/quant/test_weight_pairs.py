"""Neighbouring weights of one sign stay small enough for kernels that add two products in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.error_compensation import compensated, row_errors
from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.quant.grid import decode
from sqakd_fx.quant.init_ranges import mse_optimal
from sqakd_fx.quant.levels import LARGEST_CODE, LARGEST_PAIR, LARGEST_SUM
from sqakd_fx.quant.quantizer import Quantizer, UnifiedQuantize
from sqakd_fx.quant.weight_pairs import gradient_of_pairs, within_pairs
from sqakd_fx.recipe.resolution import resolve_recipe

STEPPED = [name for name, family in FAMILIES.items() if family.weight.pairs]


def largest_sum(codes: Tensor) -> int:
    """Of two neighbours of one sign along axis 1, beside activations of 255, without its sign."""
    even = codes.to(torch.int64)[:, : codes.shape[1] // 2 * 2]
    return 255 * int((even[:, ::2] + even[:, 1::2]).abs().max())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 8), (3, 7), (2, 4, 3, 3), (2, 1)])
def test_a_pair_moves_to_the_nearest_one_that_fits(shape: tuple[int, ...]) -> None:
    steps = (90 * normal(*shape).double()).clamp(-LARGEST_CODE, LARGEST_CODE)
    found = within_pairs(steps)
    grid = torch.linspace(-LARGEST_CODE, LARGEST_CODE, 1017, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    fits = (a + b).abs() <= LARGEST_PAIR + 1e-9
    for row in range(shape[0]):
        for k in range(0, shape[1] - 1, 2):
            wanted = steps[row, k : k + 2].reshape(2, -1).T
            got = found[row, k : k + 2].reshape(2, -1).T
            for (wa, wb), (ga, gb) in zip(wanted.tolist(), got.tolist(), strict=True):
                distances = torch.where(fits, (a - wa) ** 2 + (b - wb) ** 2, torch.inf)
                assert abs(ga + gb) <= LARGEST_PAIR + 1e-9
                assert (ga - wa) ** 2 + (gb - wb) ** 2 <= float(distances.min()) + 1e-9
    if shape[1] % 2:
        assert torch.equal(found[:, -1], steps[:, -1])


@pytest.mark.parametrize("shape", [(4, 6), (4, 5), (3, 4, 2, 2)])
def test_its_gradient_is_that_of_autograd_and_of_finite_differences(shape: tuple[int, ...]) -> None:
    steps = (90 * normal(*shape).double()).clamp(-LARGEST_CODE, LARGEST_CODE).requires_grad_()
    assert torch.autograd.gradcheck(within_pairs, (steps,))
    gradient = normal(*shape, seed=1).double()
    (wanted,) = torch.autograd.grad(within_pairs(steps), steps, gradient)
    assert torch.allclose(gradient_of_pairs(gradient, steps.detach()), wanted)


@pytest.mark.parametrize("family", ["lsq", "lsq+"])
def test_a_quantizer_has_the_gradients_of_its_equations_with_rounding_passed_through(
    family: str,
) -> None:
    weight = normal(5, 8).double()
    made = Quantizer(family, "weight", 8, channels=5, axis=0, largest_code=64, paired=True)
    made.initialize(weight, "mse")
    made = made.double()
    with torch.no_grad():
        made.step.mul_(0.7)
    ours = weight.clone().requires_grad_()
    gradient = normal(5, 8, seed=1).double()
    scale = made.interval(ours).scale_in[:, None].detach().double()
    exact, step = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    steps = within_pairs((exact / step).clamp(-LARGEST_CODE, LARGEST_CODE))
    rounded = steps + (torch.round(steps) - steps).detach()
    wanted = torch.autograd.grad(rounded * step, (exact, step), gradient)
    at = made.interval(ours)
    found = UnifiedQuantize.apply(
        ours, scale.requires_grad_(), at.offset, None, at.lowest, made.delta, made.mu, 254, 0.0, True, False, True,
    )  # fmt: skip
    got = torch.autograd.grad(found, (ours, scale), gradient)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("family", STEPPED)
@pytest.mark.parametrize("shape", [(5, 40), (5, 7), (5, 6, 3, 3)])
def test_no_pair_overflows_wherever_training_takes_the_step(
    family: str, shape: tuple[int, ...]
) -> None:
    weight = normal(*shape) / 5
    made = Quantizer(family, "weight", 8, channels=5, axis=0, largest_code=64, paired=True)
    made.initialize(weight, "mse")
    assert int(made.codes(weight).abs().max()) > 64
    start = made.step.detach().clone()
    for factor in (1.0, 0.7, 0.2, 1e-3, 3.0):
        with torch.no_grad():
            made.step.copy_(factor * start)
        codes = made.codes(weight)
        assert largest_sum(codes) <= LARGEST_SUM
        assert torch.equal(decode(codes, made.grid(weight)), made(weight).detach() + 0.0)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(STEPPED)))
def test_a_family_that_chooses_no_step_keeps_within_64(family: str) -> None:
    weight = normal(5, 40)
    made = Quantizer(family, "weight", 8, channels=5, axis=0, largest_code=64, paired=True)
    made.initialize(weight, "mse")
    assert int(made.codes(weight).abs().max()) <= 64


def test_pairs_lose_less_than_a_range_of_64_for_every_weight() -> None:
    for seed in range(3):
        weight = normal(16, 64, seed=seed)
        errors = {}
        for paired in (False, True):
            made = Quantizer(
                "lsq", "weight", 8, channels=16, axis=0, largest_code=64, paired=paired
            )
            made.initialize(weight, "mse")
            errors[paired] = float((made(weight).detach() - weight).square().mean())
        assert errors[True] < 0.75 * errors[False]


def test_weights_of_one_size_get_a_step_with_which_their_pairs_fit() -> None:
    weight = torch.ones(2, 8)
    made = Quantizer("lsq", "weight", 8, channels=2, axis=0, largest_code=64, paired=True)
    made.initialize(weight, "mse")
    assert float((made(weight).detach() - weight).abs().max()) < 0.01
    found = mse_optimal(weight, made.levels)
    assert (found.upper >= 1.9).all()


def test_rounding_that_is_compensated_leaves_no_pair_that_overflows_and_loses_less() -> None:
    errors = {"nearest": 0.0, "compensated": 0.0}
    for seed in range(3):
        inputs = normal(512, 32, seed=seed) @ normal(32, 32, seed=seed + 10)
        moment = (inputs.T @ inputs / len(inputs))[None]
        weight = normal(16, 32, seed=seed + 20)
        made = Quantizer("lsq", "weight", 8, channels=16, axis=0, largest_code=64, paired=True)
        made.initialize(weight, "mse")
        scale = made.step.detach()[None]

        def nearest(column: Tensor, scale: Tensor = scale) -> Tensor:
            return torch.round(column / scale).clamp(-LARGEST_CODE, LARGEST_CODE) * scale

        starts = {"nearest": weight, "compensated": compensated(weight[None], moment, nearest)[0]}
        for name, start in starts.items():
            assert largest_sum(made.codes(start)) <= LARGEST_SUM
            difference = (made(start).detach() - weight)[None]
            errors[name] += float(row_errors(difference, moment).sum())
    assert errors["compensated"] < 0.5 * errors["nearest"]


LAYERS = {
    "pointwise": (nn.Conv2d(5, 4, 1), True),
    "even": (nn.Conv2d(4, 4, 3), True),
    "odd": (nn.Conv2d(5, 4, 3), False),
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), True),
    "odd groups": (nn.Conv2d(6, 4, 3, groups=2), False),
    "transposed": (nn.ConvTranspose2d(4, 4, 2), False),
    "linear": (nn.Linear(9, 4), True),
}
"""A layer, and whether all kernels pair its weights alike."""


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_takes_pairs_where_every_kernel_makes_the_same_ones(layer: str) -> None:
    module, pairs = LAYERS[layer]
    torch.manual_seed(0)
    columns = module.weight.shape[0 if "transposed" in layer else 1] * getattr(module, "groups", 1)
    shape = (8, columns) if isinstance(module, nn.Linear) else (8, columns, 6, 6)
    x = torch.randn(shape)
    recipe = resolve_recipe("w8a8", settings=["weight_range=paired", "first_last=same"])
    program = build_program(module.eval(), x, recipe)
    calibrate(program.student, [(x,)], method="mse")
    stored = dict(lower(program.student).graph_module.named_buffers())
    (codes,) = (c for c in stored.values() if c.dtype == torch.int8)
    assert (int(codes.int().abs().max()) > 64) == pairs
    if pairs:
        assert largest_sum(codes) <= LARGEST_SUM
