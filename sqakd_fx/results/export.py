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
from sqakd_fx.results.interface import interface_of
from sqakd_fx.results.student import SavedStudent, lowered_of


def export_job(lowered: fx.GraphModule, program: Program) -> Export:
    """What the exporters need to know of a lowered student."""
    return Export(
        lowered,
        distillation_teacher(program),
        program.example,
        program.recipe.opset,
        _metadata(program.recipe),
        interface=interface_of(program),
        fixed_batch=program.traced.fixed_batch,
    )


def _metadata(recipe: Recipe) -> dict[str, str]:
    return {
        "sqakd_fx.version": version("sqakd-fx"),
        "sqakd_fx.recipe": recipe.name,
        "sqakd_fx.bits": f"w{recipe.weight_bits}a{recipe.activation_bits}",
        "sqakd_fx.family": f"{recipe.weight_family}/{recipe.activation_family}",
    }


def export(
    program: Program, lowered: fx.GraphModule, path: str | Path, *, profile: str | None = None
) -> Exported:
    """Write an integer program in a profile, the recipe's where none is given.

    `lowered` is what `lower` makes of the program's student. A file is left behind only where it is whole.

    Raises:
        ExportError: no such profile, or the target cannot take the model. StorageError: the file cannot be written.
    """
    return write_profile(
        profile or program.recipe.profile, export_job(lowered, program), Path(path)
    )


def export_saved(saved: SavedStudent, path: Path, *, profile: str | None = None) -> Exported:
    """Write the integer program of a saved student in a profile, the recipe's where none is given.

    Raises:
        ExportError: no such profile, or one of the float model, which a result folder does not hold. StorageError: the
        file cannot be written, or the student is damaged.
    """
    recipe = saved.recipe
    job = Export(
        lowered_of(saved),
        None,
        saved.example,
        recipe.opset,
        _metadata(recipe),
        interface=saved.interface,
        fixed_batch=saved.fixed_batch,
    )
    return write_profile(profile or recipe.profile, job, path)


def check_export(program: Program) -> None:
    """Export the calibrated student and let it go, so that what has no ONNX form is known before training.

    Raises:
        PassError; ExportError, also where ONNX Runtime refuses the model.
    """
    with undisturbed_randomness(), tempfile.TemporaryDirectory() as folder:
        export(program, lower(program.student).graph_module, Path(folder) / "model.onnx")
