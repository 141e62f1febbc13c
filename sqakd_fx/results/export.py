"""From a lowered student to a file of a profile."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, fx

from sqakd_fx.engine.determinism import undisturbed_randomness
from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.interface import Interface
from sqakd_fx.exporters.profiles import Export, Exported, write_profile
from sqakd_fx.ir import meta
from sqakd_fx.program import Program, distillation_teacher, lower
from sqakd_fx.targets import TARGETS
from sqakd_fx.validation.target_rules import TARGET_KEY, check_rules


def export_job(lowered: fx.GraphModule, program: Program, target: str | None = None) -> Export:
    """What the exporters need to know of a lowered student; the recipe's target where none is given."""
    recipe = program.recipe
    target = target or recipe.target
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
            TARGET_KEY: target,
        },
        smallest_weights=TARGETS[target].smallest_weights,
        interface=_interface(program),
        fixed_batch=program.traced.fixed_batch,
    )


def _interface(program: Program) -> Interface:
    """What the model, its inputs and its outputs are, as they are known of the example."""
    name = type(program.traced.graph_module).__name__
    batch = ", the example's batch size only" if program.traced.fixed_batch else ""
    inputs = tuple(
        f"argument {argument} of {name}{_range(x)}{batch}"
        for argument, x in zip(program.input_names, program.example, strict=True)
    )
    kinds = {one.index: one.description for one in program.outputs}
    (end,) = program.teacher.graph.find_nodes(op="output")
    count = len(meta.output_names(end))
    outputs = tuple(kinds.get(index, "not a floating-point output") for index in range(count))
    return Interface(name, inputs, outputs)


def _range(x: Tensor) -> str:
    if not x.numel() or x.dtype == torch.bool:
        return ""
    return f", from {x.min().item():.4g} to {x.max().item():.4g} in the example"


def export(
    program: Program,
    lowered: fx.GraphModule,
    path: str | Path,
    *,
    profile: str | None = None,
    target: str | None = None,
) -> Exported:
    """Write an integer program for a target, the recipe's where none is given, or in any profile.

    `lowered` is what `lower` makes of the program's student. A file is left behind only where it is whole and keeps the
    target's rules.

    Raises:
        ExportError: no such profile or target, or the target cannot take the model. StorageError: the file cannot be
            written.
    """
    target = target or program.recipe.target
    if target not in TARGETS:
        raise ExportError(f"there is no target {target!r}: choose {', '.join(TARGETS)}")
    job = export_job(lowered, program, target)
    if profile is not None:
        return write_profile(profile, job, Path(path))
    chosen = TARGETS[target].profile or program.recipe.profile
    return write_profile(chosen, job, Path(path), lambda made: check_rules(made, target))


def check_export(program: Program) -> None:
    """Export the calibrated student and let it go, so that what has no ONNX form is known before training.

    Raises:
        PassError; ExportError, also where ONNX Runtime refuses the model.
    """
    with undisturbed_randomness(), tempfile.TemporaryDirectory() as folder:
        export(program, lower(program.student).graph_module, Path(folder) / "model.onnx")
