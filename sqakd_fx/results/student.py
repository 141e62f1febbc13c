"""A trained student on disk: enough to rebuild it from its source."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file, save_file

from sqakd_fx.errors import SourceError, StorageError
from sqakd_fx.program import Program, build_program, enable_quantizers
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe import read_toml, resolve_recipe, to_toml
from sqakd_fx.results import markdown as reporting
from sqakd_fx.source.source import Source
from sqakd_fx.storage import read_json, write_atomically, write_json, write_text

_WEIGHT_RANGE_OF_0_1 = "full"
"""What a student was trained with whose recipe does not say it."""


def save_student(program: Program, source: Source, out: Path) -> None:
    """student.safetensors, program.json and recipe.toml: enough to rebuild it from the source."""
    state = {
        k: v.detach().cpu().contiguous().clone() for k, v in program.student.state_dict().items()
    }
    write_atomically(out / "student.safetensors", lambda path: save_file(state, path))
    write_text(out / "recipe.toml", to_toml(program.recipe))
    write_json(
        out / "program.json",
        {
            "source": source.spec,
            "version": version("sqakd-fx"),
            "inputs": list(program.input_names),
            "quantizers": {
                name: {"family": q.family.name, "role": q.role, "bits": q.bits}
                for name, q in quantizers_of(program.student).items()
            },
            "notes": [asdict(note) for note in program.notes],
            "log": reporting.log_as_json(program.log),
        },
    )


def load_student(out: Path, source: Source) -> Program:
    """Rebuild the trained student of a result folder.

    Raises:
        StorageError: the folder lacks a file. SourceError: the source is no longer the same model.
    """
    read_json(out / "program.json")
    written = read_toml(out / "recipe.toml")
    recipe = resolve_recipe({"weight_range": _WEIGHT_RANGE_OF_0_1} | written)
    program = build_program(
        source.model, source.example_inputs, recipe, example_kwargs=source.example_kwargs
    )
    path = out / "student.safetensors"
    try:
        state = load_file(path)
    except Exception as error:
        raise StorageError(
            f"{path} is missing or damaged: run `sqakd-fx quantize` again"
        ) from error
    try:
        program.student.load_state_dict(state)
    except RuntimeError as error:
        raise SourceError(
            f"the student in {out} does not fit the model of {source.spec}: was the model changed?"
        ) from error
    enable_quantizers(program.student)
    program.student.eval()
    return program
