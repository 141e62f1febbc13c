"""Mixtures of images: the papers' formulas pixel by pixel, and training that is resumed or has labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import distilled
from torch import Tensor, nn

from sqakd_fx.program import Program, build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.mixing import can_mix, mixed

FLAT = torch.arange(400.0).reshape(400, 1, 1, 1).expand(400, 2, 16, 12).contiguous()
"""Images of one colour each, so that a pixel says which image it is of."""


def recipe(kind: str, **more: int) -> Recipe:
    return resolve_recipe("w4a4", mixing=kind, seed=3, **more)


def test_cutmix_puts_a_box_of_the_next_image_into_each_with_areas_over_all_of_0_to_1() -> None:
    (out,) = mixed((FLAT,), recipe("cutmix"), 0)
    own, pasted = out == FLAT, out == FLAT.roll(1, 0)
    assert bool((own | pasted).all())
    assert torch.equal(pasted[:, 0], pasted[:, 1])  # all channels alike
    boxes = pasted[:, 0].numpy()
    for box in boxes:
        rows, columns = box.any(1), box.any(0)
        assert np.array_equal(box, rows[:, None] & columns[None, :])
        for side in (rows, columns):
            found = np.flatnonzero(side)
            assert len(found) == 0 or found[-1] - found[0] + 1 == len(found)
    share = boxes.mean(axis=(1, 2))
    assert share.min() < 0.02
    assert share.max() > 0.7
    assert 0.2 < share.mean() < 0.4  # boxes over the edge are cut: less than the half of E[1 - λ]


def test_mixup_is_a_weighted_mean_in_which_the_image_itself_weighs_most() -> None:
    (out,) = mixed((FLAT,), recipe("mixup"), 0)
    kept = (out - FLAT.roll(1, 0)) / (FLAT - FLAT.roll(1, 0))
    weights = kept.double().flatten(1).numpy()
    assert np.ptp(weights, axis=1).max() < 1e-4
    assert weights.min() >= 0.5 - 1e-4
    assert weights.max() <= 1 + 1e-4
    assert weights.std() > 0.1


def test_a_mixture_follows_from_the_seed_and_the_step_and_leaves_other_batches_alone() -> None:
    same = recipe("cutmix", mix_every=2)
    assert torch.equal(mixed((FLAT,), same, 1)[0], mixed((FLAT,), same, 1)[0])
    assert not torch.equal(mixed((FLAT,), same, 1)[0], mixed((FLAT,), same, 3)[0])
    assert mixed((FLAT,), same, 0)[0] is FLAT
    assert mixed((FLAT,), recipe("none"), 1)[0] is FLAT


def test_two_inputs_of_one_call_are_cut_alike() -> None:
    a, b = mixed((FLAT, -FLAT), recipe("cutmix"), 0)
    assert torch.equal(a, -b)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_what_is_no_tensor_stays_as_it_is(kind: str) -> None:
    number, images = mixed((3, FLAT), recipe(kind), 0)
    assert number == 3
    assert torch.equal(images, mixed((FLAT,), recipe(kind), 0)[0])


@pytest.mark.parametrize(
    ("inputs", "can"),
    [
        ((FLAT,), True),
        ((FLAT, 3), True),
        ((torch.zeros(2, 5),), False),
        ((FLAT.long(),), False),
        ((FLAT, torch.zeros(400, 3)), False),
        ((), False),
    ],
)
def test_only_images_are_mixed(inputs: tuple[Tensor, ...], can: bool) -> None:
    assert can_mix(inputs) is can


def ready(net: nn.Module, inputs: Tensor, chosen: Recipe) -> Program:
    program = build_program(net, inputs, chosen)
    calibrate(program.student, [(inputs,)])
    return program


def test_training_on_mixtures_is_another_training(residual_net: nn.Module, images: Tensor) -> None:
    losses = set()
    for kind in ("none", "cutmix", "mixup"):
        chosen = recipe(kind, steps=3)
        losses.add(distilled(ready(residual_net, images, chosen), images, chosen).loss)
    assert len(losses) == 3


def test_where_nothing_can_be_mixed_a_note_says_so_once() -> None:
    rows = torch.randn(8, 6)
    chosen = recipe("cutmix", steps=3)
    done = distilled(ready(nn.Linear(6, 4).eval(), rows, chosen), rows, chosen)
    assert done.notes.count("mixing has no effect: the inputs are not images") == 1
