"""Ours: the training loop itself, which asks for a batch whenever it wants to take a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sqakd_fx.engine.determinism import repeatable_arithmetic
from sqakd_fx.program import build_program, distillation_teacher
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.loop import distil
from sqakd_fx.training.step_batches import TrainingData

ENDLESS = 1_000_000


def train(
    setup: Mapping[str, Any], model: nn.Module, images: Tensor, batches: Iterator[Tensor]
) -> None:
    """Distil the preset of the bits, as the command line does, on the batches that are asked for."""
    bits = setup["bits"]
    recipe = resolve_recipe(
        f"w{bits}a{bits}",
        compile="always" if setup["compile"] else "never",
        precision=setup["precision"],
        steps=ENDLESS,
    )
    program = build_program(model.cpu(), images[:2].cpu(), recipe)
    student = program.student.to(images.device)
    calibrate(student, [(images,)], method=recipe.initialization)
    with repeatable_arithmetic(images.device, recipe.tf32, recipe.deterministic):
        distil(
            student,
            distillation_teacher(program).to(images.device),
            TrainingData(lambda epoch: ((batch,) for batch in batches), ENDLESS),
            recipe,
            images.device,
        )
