"""`validate`: a file against the student of its folder, on the user's data or on inputs drawn for it."""

from __future__ import annotations

import sys
from pathlib import Path

from sqakd_fx.frontend.output_kinds import class_axes
from sqakd_fx.program import lower
from sqakd_fx.results.evaluate import validation_batches
from sqakd_fx.results.other_sizes import with_other_sizes
from sqakd_fx.results.saved_inputs import drawn_inputs, inputs_of
from sqakd_fx.results.student import load_saved, load_student, lowered_of
from sqakd_fx.source.inputs import source_inputs
from sqakd_fx.source.source import Source, require_data
from sqakd_fx.validation.validate import validate
from sqakd_fx.validation.verdict import Validation


def validate_saved(
    folder: Path, path: Path, data: Path | None, runtime: str, tokenizer: str | None = None
) -> Validation:
    """By what the folder holds; no Python code that it names is run.

    Raises:
        SourceError: the data cannot be read, or there is a tokenizer and no data.
    """
    require_data(data, None, tokenizer)
    saved = load_saved(folder)
    if data is None:
        print(
            "note: no data is named: the example inputs and samples drawn within the trained ranges are validated on; "
            "--data or --source names data",
            file=sys.stderr,
        )
    batches = drawn_inputs(saved) if data is None else inputs_of(saved, data, tokenizer)
    axes, graphs = class_axes(saved.outputs), (saved.student, lowered_of(saved))
    checked = validate(*graphs, path, batches, axes, runtime)
    return with_other_sizes(checked, graphs, path, saved, axes)


def validate_with_source(folder: Path, path: Path, source: Source, runtime: str) -> Validation:
    """By the user's source: its model, which must be the folder's, and its data."""
    program = load_student(folder, source)
    inputs = None if source.train_data is None else source_inputs(source, program)
    batches = (batch for batch, _ in validation_batches(source, program, inputs))
    axes = class_axes(program.outputs)
    graphs = (program.student, lower(program.student).graph_module)
    checked = validate(*graphs, path, batches, axes, runtime)
    return with_other_sizes(checked, graphs, path, program, axes)
