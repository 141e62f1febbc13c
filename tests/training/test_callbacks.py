"""Low-bit callback: fewer bits step by step, weights that swing, the average of weights; each survives a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import distilled
from torch import Tensor, nn

from sqakd_fx.errors import RecipeError, TrainingError
from sqakd_fx.program import Program, build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.checkpoint import Checkpoint, save_checkpoint
from sqakd_fx.training.oscillation import OscillationFreezing
from sqakd_fx.training.progressive_bits import stage_of

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def student_of(recipe: Recipe) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    program = build_program(model, ROWS, recipe)
    calibrate(program.student, [(ROWS,)])
    return program


def train(recipe: Recipe, checkpoints: Path | None = None, *, resume: bool = False) -> Program:
    program = student_of(recipe)
    distilled(program, ROWS, recipe, checkpoints=checkpoints, resume=resume)
    return program


def callback(*settings: str) -> Recipe:
    return resolve_recipe(
        "w2a2", settings=["first_last='same'", "residual_bits=2", "steps=12", *settings]
    )


def test_bits_narrow_in_stages_and_end_at_the_recipes_own() -> None:
    recipe = callback("progressive=[8, 4]", "progressive_share=0.5")
    assert [stage_of(recipe, step, 12) for step in (0, 2, 3, 5, 6, 11)] == [0, 0, 1, 1, 2, 2]
    assert {q.bits for q in quantizers_of(train(recipe).student).values()} == {2}


def test_a_quantizer_is_never_narrower_than_its_own_bits_on_the_way() -> None:
    recipe = resolve_recipe("w2a2", settings=["steps=2", "progressive=[4]"])
    program = student_of(recipe)
    before = {name: q.bits for name, q in quantizers_of(program.student).items()}
    assert 8 in before.values()  # first and last layer
    after = {name: q.bits for name, q in quantizers_of(train(recipe).student).items()}
    assert after == before


@pytest.mark.parametrize(
    "settings",
    [
        ("progressive=[8, 4]", "progressive_share=0.6"),
        ("freeze_oscillations=0.001", "freeze_from=0.2"),
        ("weight_average=0.9",),
        ("delta_refresh=3",),
        ("mu=0.2", "mu_schedule=cosine"),
        ("feature_weight=1.0", "feature_fade=0.6"),
    ],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    settings = (*settings, "checkpoint_steps=5", "schedule=constant")
    whole = train(callback(*settings)).student.state_dict()
    train(callback(*settings), tmp_path)
    for newer in sorted(tmp_path.glob("step-*"))[2:]:
        newer.unlink()
    resumed = train(callback(*settings), tmp_path, resume=True).student.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def weight_of(program: Program) -> Tensor:
    return next(p for n, p in program.student.named_parameters() if n.endswith("weight"))


def test_a_weight_that_swings_between_two_codes_is_held_and_a_calm_one_moves_on() -> None:
    recipe = callback("freeze_oscillations=0.02", "freeze_from=0.0", "zero_in_grid=true")
    program = student_of(recipe)
    freezing = OscillationFreezing(program.student, recipe)
    one = next(iter(freezing.watched.values()))
    step = one.quantizer.interval(one.weight).scale_in.detach()[0]
    with torch.no_grad():
        one.weight[0, :2] = torch.stack([0.4 * step, 0.4 * step])
        for index in range(8):
            freezing.before_step(index, 100)
            one.weight[0, 0] = (0.4 if index % 2 else 0.6) * step
            one.weight[0, 1] += 0.01 * step
            freezing.after_step(index, 100)
    assert not one.frozen[0, 0].isnan()
    assert one.frozen[0, 1].isnan()
    assert float(one.weight[0, 0].detach()) in (0.0, float(step))


def test_freezing_refuses_a_family_that_transforms_its_weights() -> None:
    recipe = callback("freeze_oscillations=0.1", "weight_family='dorefa'")
    with pytest.raises(RecipeError, match="dorefa"):
        train(recipe)


def test_bits_that_no_grid_has_are_refused_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match="progressive"):
        callback("progressive=[16]")


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(3, {}, {"optimizer": {}, "rate_factor": 1.0}))
    with pytest.raises(TrainingError, match="start again without --resume"):
        train(callback(), tmp_path, resume=True)


def test_early_stopping_without_held_out_samples_says_that_it_has_no_effect() -> None:
    recipe = callback("early_stop=1")
    program = student_of(recipe)
    done = distilled(program, ROWS, recipe)
    assert done.steps == 12
    assert any("early_stop has no effect" in note for note in done.notes)
