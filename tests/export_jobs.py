"""A network, calibrated and lowered: what a profile writes."""

from __future__ import annotations

from torch import Tensor, nn

from sqakd_fx.exporters.profiles import Export
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export_job


def job_of(
    model: nn.Module, images: Tensor, bits: str, family: str = "lsq", *settings: str
) -> tuple[Program, Export]:
    recipe = resolve_recipe(bits, settings=[f"weight_family={family}", *settings])
    program = build_program(model, images, recipe)
    calibrate(program.student, [(images,)])
    return program, export_job(lower(program.student).graph_module, program)
