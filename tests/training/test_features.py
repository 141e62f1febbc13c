"""The feature term: the paper's formula at the place that the graph gives, and one graph that trains."""

from __future__ import annotations

import pytest
import torch
from conftest import distilled
from torch import Tensor, nn

from sqakd_fx.program import Program, build_program, distillation_teacher
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.callbacks import low_bit_callbacks
from sqakd_fx.training.features import feature_places, training_pair
from sqakd_fx.training.losses import distillation_loss


def featured(*settings: str) -> Recipe:
    return resolve_recipe("w2a2", settings=["feature_weight=0.5", "steps=2", *settings])


def calibrated(net: nn.Module, images: Tensor, recipe: Recipe) -> Program:
    program = build_program(net, images, recipe)
    calibrate(program.student, [(images,)])
    return program


def test_the_late_place_is_the_last_tensor_with_space_and_sums_are_all_of_them(
    residual_net: nn.Module, images: Tensor
) -> None:
    program = calibrated(residual_net, images, featured())
    teacher = distillation_teacher(program)
    late = feature_places(program.student, teacher, "late")
    sums = feature_places(program.student, teacher, "sums")
    assert len(late) == 1
    assert len(sums) == 2  # two residual blocks
    assert late[0][1].name == sums[-1][1].name or late[0][1] in teacher.graph.nodes


@pytest.mark.parametrize("target", ["quantized", "float"])
def test_the_loss_is_kl_and_the_distance_of_features_as_the_student_or_the_teacher_sees_them(
    residual_net: nn.Module, images: Tensor, target: str
) -> None:
    recipe = featured("features='sums'", f"feature_target={target!r}")
    program = calibrated(residual_net, images, recipe)
    student, teacher = program.student.eval(), distillation_teacher(program)
    seen: dict[str, Tensor] = {}
    places = feature_places(student, teacher, "sums")
    for quantized, _ in places:
        name = str(quantized.target)
        student.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
    scores, wanted = student(images).double(), teacher(images).double()
    own = {name: value.double() for name, value in seen.items()}
    pair = training_pair(student, teacher, recipe)
    output, theirs = pair.student(images), pair.teacher(images)
    p, q = (wanted / recipe.temperature).softmax(1), (scores / recipe.temperature).softmax(1)
    expected = recipe.temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    for (quantized, _), feature in zip(places, theirs[1], strict=True):
        quantizer = student.get_submodule(str(quantized.target))
        grid = quantizer.grid()  # type: ignore[operator]
        scale = grid.scale.double()
        codes = torch.round(feature.double() / scale) + grid.zero_point
        on_grid = (codes.clamp(grid.qmin, grid.qmax) - grid.zero_point) * scale
        wanted = on_grid if target == "quantized" else feature.double()
        error = own[str(quantized.target)] - wanted
        expected += 0.5 * (error**2).mean() / wanted.var(correction=0)
    assert float(pair.loss(output, theirs)) == pytest.approx(float(expected), rel=1e-3)


def test_training_with_features_moves_the_students_own_parameters(
    residual_net: nn.Module, images: Tensor
) -> None:
    recipe = featured()
    program = calibrated(residual_net, images, recipe)
    before = {name: value.clone() for name, value in program.student.state_dict().items()}
    done = distilled(program, images, recipe)
    after = program.student.state_dict()
    assert done.steps == 2
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert program.student(images).shape == (16, 10)


def test_the_weight_of_features_falls_evenly_to_nothing_and_stays_there(
    residual_net: nn.Module, images: Tensor
) -> None:
    recipe = featured("features='sums'", "feature_fade=0.5")
    program = calibrated(residual_net, images, recipe)
    pair = training_pair(program.student, distillation_teacher(program), recipe)
    (fading,) = low_bit_callbacks(program.student, recipe, lambda: [(images,)], pair, 1)
    output, theirs = pair.student(images), pair.teacher(images)
    alone = float(distillation_loss(recipe)(output[0], theirs[0]))
    losses = []
    for step in (0, 2, 4, 8, 15):
        fading.before_step(step, 16)
        losses.append(float(pair.loss(output, theirs)) - alone)
    assert losses[0] > 0
    assert [loss / losses[0] for loss in losses] == pytest.approx([1, 0.75, 0.5, 0, 0], abs=1e-5)


def test_features_that_would_fade_and_have_no_weight_are_told_of(
    residual_net: nn.Module, images: Tensor
) -> None:
    recipe = resolve_recipe("w4a4", steps=1, settings=["feature_fade=0.5"])
    done = distilled(calibrated(residual_net, images, recipe), images, recipe)
    assert any("feature_fade has no effect" in note for note in done.notes)


def test_a_network_without_an_inner_quantized_tensor_trains_on_its_output_and_says_so() -> None:
    rows = torch.randn(8, 4)
    recipe = resolve_recipe("w1a1", steps=2)
    program = calibrated(nn.Sequential(nn.Linear(4, 3)).eval(), rows, recipe)
    done = distilled(program, rows, recipe)
    assert done.steps == 2
    assert any("feature_weight has no effect" in note for note in done.notes)


def test_a_teacher_that_is_no_graph_trains_the_student_on_its_output_and_a_note_says_so(
    residual_net: nn.Module, images: Tensor
) -> None:
    program = calibrated(residual_net, images, featured())
    pair = training_pair(program.student, residual_net, featured())
    assert pair.teacher is residual_net
    assert pair.note is not None
    assert "no traced graph" in pair.note
