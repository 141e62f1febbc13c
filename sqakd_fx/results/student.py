"""A trained student on disk: rebuilt from the data of its folder, or from its source where the user names that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from sqakd_fx.engine.memory_format import store_contiguous
from sqakd_fx.errors import (
    PassError,
    SourceError,
    SqakdError,
    StorageError,
    UnknownFamilyError,
    short,
)
from sqakd_fx.exporters.interface import Interface
from sqakd_fx.frontend.output_kinds import OutputKind
from sqakd_fx.ir import meta
from sqakd_fx.ir.copying import deep_copy
from sqakd_fx.ir.outputs import tensors_of
from sqakd_fx.ir.pass_manager import Note
from sqakd_fx.program import Program, build_program, enable_quantizers, lower
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.free_axes import FreeAxes, free_axes
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import read_toml, resolve_recipe, to_toml
from sqakd_fx.results import markdown as reporting
from sqakd_fx.results.folder import settle
from sqakd_fx.results.interface import interface_of
from sqakd_fx.results.saved_graph import decode_graph, encode_graph, tensors_in
from sqakd_fx.results.saved_values import NotSaved
from sqakd_fx.source.source import Source
from sqakd_fx.storage import read_json, write_atomically, write_json, write_text

_WEIGHT_RANGE_OF_0_1 = "full"
"""What a student was trained with whose recipe does not say it."""
_FORMAT = 2
_NOTES = TypeAdapter(tuple[Note, ...])
_OUTPUTS = TypeAdapter(tuple[OutputKind, ...])
_OUTPUT_NAMES = TypeAdapter(tuple[str, ...])
_INTERFACE = TypeAdapter(Interface)


@dataclass(frozen=True)
class SavedStudent:
    """A trained student as its folder alone gives it; the float teacher is not there."""

    student: fx.GraphModule
    example: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    outputs: tuple[OutputKind, ...]
    interface: Interface
    notes: tuple[Note, ...]
    fixed_batch: bool
    front_end: str
    recipe: Recipe

    @property
    def free_axes(self) -> FreeAxes:
        """The axes of each input whose sizes a file leaves open, beside the batch."""
        shapes = [tuple(x.shape) for x in self.example]
        return free_axes(self.recipe.dynamic, dict(zip(self.input_names, shapes, strict=True)))


def save_student(program: Program, source: Source, out: Path) -> None:
    """student.safetensors, example.safetensors, graph.json, program.json and recipe.toml: all that rebuilds it.

    graph.json has no graph, and says why, where the student runs Python code of the user's own.
    """
    state = {name: _plain(tensor) for name, tensor in tensors_in(program.student).items()}
    example = {
        name: _plain(x) for name, x in zip(program.input_names, program.example, strict=True)
    }
    write_atomically(out / "student.safetensors", lambda path: save_file(state, path))
    write_atomically(out / "example.safetensors", lambda path: save_file(example, path))
    write_text(out / "graph.json", _graph_text(program, state))
    write_text(out / "recipe.toml", to_toml(program.recipe))
    write_json(
        out / "program.json",
        {
            "format": _FORMAT,
            "source": source.spec,
            "version": version("sqakd-fx"),
            "inputs": list(program.input_names),
            "outputs": [asdict(one) for one in program.outputs],
            "output_names": list(meta.output_names(program.teacher.graph.output_node())),
            "interface": asdict(interface_of(program)),
            "fixed_batch": program.traced.fixed_batch,
            "front_end": program.traced.front_end,
            "quantizers": {
                name: {"family": q.family.name, "role": q.role, "bits": q.bits}
                for name, q in quantizers_of(program.student).items()
            },
            "notes": [asdict(note) for note in program.notes],
            "log": reporting.log_as_json(program.log),
        },
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _graph_text(program: Program, state: Mapping[str, Tensor]) -> str:
    """The graph, one node a line; instead why there is none, where what is read back would not be the student."""
    try:
        graph = encode_graph(program.student)
        _require_same(program, decode_graph(json.loads(json.dumps(graph)), state))
    except NotSaved as error:
        return json.dumps({"missing": str(error)}) + "\n"
    except Exception as error:
        return json.dumps({"missing": f"cannot be read back ({short(error)})"}) + "\n"
    nodes = ",\n".join(json.dumps(node) for node in graph.pop("nodes"))
    return f'{json.dumps(graph)[:-1]}, "nodes": [\n{nodes}\n]}}\n'


def _require_same(program: Program, made: fx.GraphModule) -> None:
    """Raise NotSaved where `made` gives something else: a module may hold what is no plain attribute.

    Both compute in one memory format: sums of another order move codes by a step, and outputs of deep networks by more.
    """
    student = deep_copy(program.student)
    store_contiguous(student)
    with torch.no_grad():
        wanted, given = (tensors_of(one(*program.example)) for one in (student, made))
    alike = len(wanted) == len(given) and all(
        x.shape == y.shape
        and torch.allclose(x.float(), y.float(), rtol=0.1, atol=_tolerance(x), equal_nan=True)
        for x, y in zip(wanted, given, strict=True)
    )
    if not alike:
        raise NotSaved("gives other outputs when it is read back")


def _tolerance(x: Tensor) -> float:
    """A tenth of the largest value: a device may sum in another order."""
    return 0.1 * float(x.float().abs().max()) if x.numel() else 0.0


def load_student(out: Path, source: Source) -> Program:
    """Rebuild the trained student of a result folder from its source, with its teacher.

    Raises:
        StorageError: the folder lacks a file. SourceError: the source is no longer the same model.
    """
    settle(out)
    read_json(out / "program.json")
    program = build_program(
        source.model, source.example_inputs, recipe_in(out), example_kwargs=source.example_kwargs
    )
    state = _tensors(out / "student.safetensors")
    wanted = set(program.student.state_dict())
    constants = set(tensors_in(program.student)) - wanted
    try:
        program.student.load_state_dict({k: v for k, v in state.items() if k not in constants})
    except RuntimeError as error:
        raise SourceError(
            f"the student in {out} does not fit the model of {source.spec}: was the model changed?"
        ) from error
    enable_quantizers(program.student)
    program.student.eval()
    return program


def recipe_in(out: Path) -> Recipe:
    """The recipe that a result folder was made with."""
    written = read_toml(out / "recipe.toml")
    return resolve_recipe({"weight_range": _WEIGHT_RANGE_OF_0_1} | written)


def load_saved(out: Path) -> SavedStudent:
    """Rebuild the trained student of a result folder from the folder's own data; nothing that it names is imported.

    Raises:
        StorageError: a file is missing or damaged, or the student needs Python code that the folder only names.
    """
    settle(out)
    facts = read_json(out / "program.json")
    graph = read_json(out / "graph.json") if (out / "graph.json").exists() else None
    if not isinstance(facts, dict) or not isinstance(graph, dict | None):
        raise StorageError(f"{out} holds no student: give a folder that `sqakd-fx quantize` made")
    if graph is None or "missing" in graph:
        reason = "is of a version that kept no graph" if graph is None else str(graph["missing"])
        raise _needs_source(out, reason, facts.get("source"))
    state, example = _tensors(out / "student.safetensors"), _tensors(out / "example.safetensors")
    try:
        made = decode_graph(graph, state)
        meta.set_output_names(
            made.graph.output_node(), _OUTPUT_NAMES.validate_python(facts.get("output_names", ()))
        )
        names = tuple(str(name) for name in facts["inputs"])
        saved = SavedStudent(
            made,
            tuple(example[name] for name in names),
            names,
            _OUTPUTS.validate_python(facts["outputs"]),
            _INTERFACE.validate_python(facts.get("interface", {})),
            _NOTES.validate_python(facts["notes"]),
            bool(facts["fixed_batch"]),
            str(facts["front_end"]),
            recipe_in(out),
        )
        with torch.no_grad():
            made(*saved.example)
    except UnknownFamilyError as error:
        raise _needs_source(out, str(error), facts.get("source")) from error
    except SqakdError:
        raise
    except Exception as error:
        raise StorageError(
            f"the student in {out} is damaged ({short(error)}): make it again"
        ) from error
    return saved


def _needs_source(out: Path, reason: str, source: Any) -> StorageError:
    named = f"; the folder names {str(source)[:200]!r}" if source else ""
    return StorageError(
        f"the student in {out} {reason}, and a result folder runs no Python code unasked{named}: give the file that "
        "you trust with --source"
    )


def lowered_of(saved: SavedStudent) -> fx.GraphModule:
    """The integer program of a saved student; raises StorageError where its data is no student's."""
    try:
        return lower(saved.student).graph_module
    except PassError:
        raise
    except Exception as error:
        raise StorageError(
            f"the saved student cannot be lowered ({short(error)}): make it again"
        ) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if not path.is_file():
            raise FileNotFoundError(path)
        return load_file(path)
    except Exception as error:
        raise StorageError(
            f"{path} is missing or damaged: run `sqakd-fx quantize` again"
        ) from error
