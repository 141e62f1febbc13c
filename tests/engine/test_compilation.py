"""Compiled steps on a CPU learn what plain ones learn."""

from __future__ import annotations

import pytest
import torch
from conftest import Block, distilled
from torch import nn

from sqakd_fx.engine.compilation import compiler_settings, has_compiler
from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.progress import StepReport

pytestmark = pytest.mark.skipif(
    not has_compiler(torch.device("cpu")), reason="no C++ compiler here"
)


def test_compiled_steps_learn_what_eager_steps_learn() -> None:
    learned = {}
    for how in ("never", "always"):
        torch.manual_seed(0)
        images = torch.randn(8, 3, 8, 8)
        model = nn.Sequential(Block(3, 4, 1), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4, 3))
        settings = ["steps=4", "optimizer=sgd", "learning_rate=0.3", f"compile={how}"]
        settings += ["batch_norm=absorb"]
        recipe = resolve_recipe("w4a4", settings=settings)
        program = build_program(model.eval(), images, recipe)
        calibrate(program.student, [(images,)])
        reports: list[StepReport] = []
        done = distilled(program, images, recipe, on_report=reports.append)
        assert done.compiled == (how == "always")
        assert (reports[-1].compile_seconds > 0) == done.compiled
        learned[how] = program.student.state_dict()
    before = build_program(model, images, recipe).student.state_dict()
    for name in ("0.conv1.weight", "0.conv2.bias", "3.weight"):
        moved = learned["never"][name] - before[name]
        apart = learned["always"][name] - learned["never"][name]
        assert apart.norm() <= 0.01 * moved.norm(), name


def test_a_compiled_maximum_has_a_gradient_whatever_the_compiler_computes_twice() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 4))
    recipe = resolve_recipe("w4a4", weight_family="dorefa")
    student = build_program(model, images, recipe).student
    calibrate(student, [(images,)])
    weight = student.get_parameter("0.weight")
    with compiler_settings():
        compiled = torch.compile(student.train())
        for _ in range(60):
            nn.init.normal_(weight)
            student.zero_grad()
            compiled(images).square().mean().backward()
            assert weight.grad is not None
            assert weight.grad.isfinite().all()
