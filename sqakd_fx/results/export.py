"""From a lowered student to a file of a profile."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

from torch import fx

from sqakd_fx.engine.determinism import undisturbed_randomness
from sqakd_fx.exporters.profiles import Export, Exported, write_profile
from sqakd_fx.program import Program, distillation_teacher, lower
from sqakd_fx.recipe import Recipe


def export_job(lowered: fx.GraphModule, program: Program, recipe: Recipe) -> Export:
    """What the exporters need to know of a lowered student."""
    return Export(
        lowered,
        distillation_teacher(program),
        program.example,
        recipe.opset,
        {
            "sqakd_fx.version": version("sqakd-fx"),
            "sqakd_fx.recipe": recipe.name,
            "sqakd_fx.bits": f"w{recipe.weight_bits}a{recipe.activation_bits}",
            "sqakd_fx.family": f"{recipe.weight_family}/{recipe.activation_family}",
        },
    )


def export_onnx(lowered: fx.GraphModule, program: Program, recipe: Recipe, path: Path) -> Exported:
    """Write the integer program in the recipe's profile; raises ExportError or StorageError."""
    return write_profile(recipe.profile, export_job(lowered, program, recipe), path)


def check_export(program: Program, recipe: Recipe) -> None:
    """Export the calibrated student and let it go, so that what has no ONNX form is known before training.

    Raises:
        PassError; ExportError, also where ONNX Runtime refuses the model.
    """
    with undisturbed_randomness(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(lower(program.student).graph_module, program, recipe, path)
