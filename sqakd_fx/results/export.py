"""From a lowered student to a file of a profile."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from torch import fx

from sqakd_fx.engine.determinism import undisturbed_randomness
from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.interface import Interface
from sqakd_fx.exporters.profiles import Export, Exported, write_profile
from sqakd_fx.exporters.translation import Translator
from sqakd_fx.program import Program, distillation_teacher, lower
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.results.interface import interface_of
from sqakd_fx.results.other_sizes import require_other_sizes
from sqakd_fx.results.student import SavedStudent, lowered_of
from sqakd_fx.runtime.preprocessing import preprocess_by_input
from sqakd_fx.targets import TARGETS, Target
from sqakd_fx.validation.target_rules import TARGET_KEY, check_rules


def export_job(lowered: fx.GraphModule, program: Program, target: str | None = None) -> Export:
    """What the exporters need to know of a lowered student; the recipe's target where none is given."""
    job = _job(lowered, program, interface_of(program), target)
    return replace(
        job, teacher=distillation_teacher(program), fixed_batch=program.traced.fixed_batch
    )


def _job(
    lowered: fx.GraphModule,
    student: Program | SavedStudent,
    interface: Interface,
    target: str | None,
) -> Export:
    """What is known of a student in a program and of a saved one alike."""
    recipe = student.recipe
    row = _row(recipe, target)
    by_name = dict(zip(student.input_names, student.example, strict=True))
    return Export(
        lowered,
        None,
        student.example,
        recipe.opset,
        _metadata(recipe, target),
        interface=interface,
        smallest_weights=row.smallest_weights,
        quantized_constants=row.quantized_constants,
        free_axes=student.free_axes,
        int4_block=recipe.int4_block,
        preprocess=preprocess_by_input(recipe.preprocess, by_name),
    )


def _row(recipe: Recipe, target: str | None) -> Target:
    """The target's row, the recipe's where none is given."""
    name = target or recipe.target
    if name not in TARGETS:
        raise ExportError(f"there is no target {name!r}: choose {', '.join(TARGETS)}")
    return TARGETS[name]


def _metadata(recipe: Recipe, target: str | None) -> dict[str, str]:
    return {
        "sqakd_fx.version": version("sqakd-fx"),
        "sqakd_fx.recipe": recipe.name,
        "sqakd_fx.bits": f"w{recipe.weight_bits}a{recipe.activation_bits}",
        "sqakd_fx.family": f"{recipe.weight_family}/{recipe.activation_family}",
        TARGET_KEY: target or recipe.target,
    }


def export(
    program: Program,
    lowered: fx.GraphModule,
    path: str | Path,
    *,
    profile: str | None = None,
    target: str | None = None,
    translator: Translator | None = None,
) -> Exported:
    """Write an integer program for a target, the recipe's where none is given, or in any profile.

    `lowered` is what `lower` makes of the program's student. A file is left behind only where it is whole and keeps the
    target's rules. A `translator` that wrote the same graph with other numbers saves most of the time.

    Raises:
        ExportError: no such profile or target, or the target cannot take the model. StorageError: the file cannot be
            written.
    """
    job = export_job(lowered, program, target)
    if translator is not None:
        job = replace(job, translator=translator)
    return _written(job, program.recipe, Path(path), profile, target)


def _written(
    job: Export, recipe: Recipe, path: Path, profile: str | None, target: str | None
) -> Exported:
    if profile is not None:
        return write_profile(profile, job, path)
    chosen = _row(recipe, target).profile or recipe.profile
    name = target or recipe.target
    return write_profile(chosen, job, path, lambda made: check_rules(made, name))


def export_saved(
    saved: SavedStudent, path: Path, *, profile: str | None = None, target: str | None = None
) -> Exported:
    """Write the integer program of a saved student for a target, the recipe's where none is given, or in any profile.

    Raises:
        ExportError: no such profile or target, or one of the float model, which a result folder does not hold, or the
            trained grids do not fit the target. StorageError: the file cannot be written, or the student is damaged.
    """
    recipe = saved.recipe
    job = _job(lowered_of(saved), saved, saved.interface, target)
    job = replace(job, fixed_batch=saved.fixed_batch)
    return _written(job, recipe, path, profile, target)


def check_export(program: Program) -> Translator:
    """Export the calibrated student and let it go, so that what has no ONNX form is known before training.

    Returns what translates the student again, once it is trained.

    Raises:
        PassError; ExportError, also where ONNX Runtime refuses the model.
    """
    with undisturbed_randomness(), tempfile.TemporaryDirectory() as folder:
        lowered, translator = lower(program.student).graph_module, Translator()
        made = export(program, lowered, Path(folder) / "model.onnx", translator=translator)
        graphs = (program.student, lowered)
        require_other_sizes(graphs, made.path, program.example, program.free_axes)
    return translator
