"""The target formats by name, each written, checked and moved into place as a whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sqakd_fx.errors import ExportError, ParityError
from sqakd_fx.exporters.constants_as_floats import constants_to_floats
from sqakd_fx.exporters.container import TRANSLATIONS
from sqakd_fx.exporters.dynamic_shapes import dynamic_shapes
from sqakd_fx.exporters.encodings import SUFFIX, to_encodings
from sqakd_fx.exporters.explicit_gates import with_explicit_gates
from sqakd_fx.exporters.int4_blocks import to_int4_blocks
from sqakd_fx.exporters.interface import UNDESCRIBED, Interface
from sqakd_fx.exporters.litert import quantized_weights
from sqakd_fx.exporters.onnx_program import (
    check_model,
    export_program,
    save_model,
)
from sqakd_fx.exporters.packed import StoredWeight, pack_weights, weights_of
from sqakd_fx.exporters.preprocessing import add_preprocessing
from sqakd_fx.exporters.pt2 import save_program
from sqakd_fx.exporters.pt2e import decomposed
from sqakd_fx.exporters.qonnx import to_qonnx
from sqakd_fx.exporters.rounded_sums import keep_rounding
from sqakd_fx.exporters.shared_weights import read_apart
from sqakd_fx.exporters.slim import slim
from sqakd_fx.exporters.tensorrt import to_tensorrt
from sqakd_fx.exporters.translation import Form, Translator
from sqakd_fx.exporters.typed import type_weights
from sqakd_fx.recipe.free_axes import FreeAxes
from sqakd_fx.recipe.keys import Preprocess
from sqakd_fx.runtime.session import session
from sqakd_fx.storage import write_json


@dataclass(frozen=True)
class Export:
    """What an exporter gets: the integer program, the float teacher where it is there, and an example call.

    `smallest_weights` are the bits of the smallest type that the target knows; without `quantized_constants` tensors
    that no input changes are floats. `provider` is the ONNX Runtime provider
    that must load the file. With `fixed_batch` the file takes the example's batch size only; `free_axes`
    are the other axes of any size. Inputs of `preprocess` are images of bytes. `int4_block` is the block
    of INT4 weights for TensorRT, 0 for none. A `translator` that has
    translated the graph before saves most of the time.
    """

    lowered: fx.GraphModule
    teacher: fx.GraphModule | None
    example: Sequence[Any]
    opset: int
    metadata: Mapping[str, str]
    interface: Interface = UNDESCRIBED
    smallest_weights: int = 2
    quantized_constants: bool = True
    provider: str = "CPUExecutionProvider"
    fixed_batch: bool = False
    free_axes: FreeAxes = ()
    preprocess: Mapping[str, Preprocess] = field(default_factory=dict)
    int4_block: int = 0
    translator: Translator = field(default_factory=Translator)


@dataclass(frozen=True)
class Exported:
    """The file, how its weights are stored, and what the exporter has to say."""

    path: Path
    weights: tuple[StoredWeight, ...]
    notes: tuple[str, ...]


_TAKE_BYTES = ("container", "packed", "typed", "tensorrt")
"""Profiles whose files take images of bytes, where the recipe asks for it."""
_NO_BLOCKS = "no weight is stored in INT4: none has codes from -8 to 7 and a multiple of {block} values to sum over"
_LOADED = ("container", "packed", "typed", "tensorrt", "encodings", "float")
"""Profiles that ONNX Runtime must load before a file is left behind."""

Content = tuple[Sequence[StoredWeight], Sequence[str]]


def _onnx(job: Export, program: fx.GraphModule, profile: str) -> ir.Model:
    model = export_program(
        program,
        _example(job),
        Form(TRANSLATIONS, job.opset, _batch_axis(job), job.free_axes),
        metadata={**job.metadata, "sqakd_fx.profile": profile},
        interface=job.interface,
        translator=job.translator,
    )
    if not job.quantized_constants:
        constants_to_floats(model)
    return model


def _example(job: Export) -> Sequence[Any]:
    return job.example if job.fixed_batch else [_two(x) for x in job.example]


def _batch_axis(job: Export) -> int | None:
    return None if job.fixed_batch else 0


def _two(x: Any) -> Any:
    """Two samples: torch takes an axis of size 1 for one that is always 1."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and len(x) == 1 else x


def _save(job: Export, model: ir.Model, path: Path) -> None:
    add_preprocessing(model, job.preprocess)
    save_model(model, path)
    check_model(path)


def _container(job: Export, path: Path) -> Content:
    model = _onnx(job, job.lowered, "container")
    read_apart(model)
    keep_rounding(model)
    _save(job, model, path)
    return _in_bytes(model), ()


def _in_bytes(model: ir.Model) -> list[StoredWeight]:
    """The weights of a model that stores each in INT8."""
    stored = [(v.name, v.const_value) for v, _ in weights_of(model) if v.const_value is not None]
    return [StoredWeight(str(name), t.size, 8, t.size) for name, t in stored]


def _packed(job: Export, path: Path) -> Content:
    model = _onnx(job, job.lowered, "packed")
    content = pack_weights(model, job.provider, job.smallest_weights)
    slim(model)
    read_apart(model)
    keep_rounding(model)
    _save(job, model, path)
    return content


def _typed(job: Export, path: Path) -> Content:
    model = _onnx(job, job.lowered, "typed")
    content = type_weights(model, job.provider, job.smallest_weights)
    read_apart(model)
    keep_rounding(model)
    _save(job, model, path)
    return content


def _qonnx(job: Export, path: Path) -> Content:
    model = _onnx(job, with_explicit_gates(job.lowered), "qonnx")
    to_qonnx(model)
    save_model(model, path)
    return (), ()


def _tensorrt(job: Export, path: Path) -> Content:
    model = _onnx(job, with_explicit_gates(job.lowered), "tensorrt")
    said = to_tensorrt(model)
    blocks = to_int4_blocks(model, job.int4_block) if job.int4_block else []
    if job.int4_block and not blocks:
        said.append(_NO_BLOCKS.format(block=job.int4_block))
    _save(job, model, path)
    return [*_in_bytes(model), *blocks], said


def _encodings(job: Export, path: Path) -> Content:
    model = _onnx(job, with_explicit_gates(job.lowered), "encodings")
    content = to_encodings(model)
    save_model(model, path)
    check_model(path)
    beside = path.with_suffix(SUFFIX)
    write_json(beside, content)
    return (), (f"{beside.name} beside it has the scales and zero points",)


def _float(job: Export, path: Path) -> Content:
    if job.teacher is None:
        raise ExportError(
            "the profile float is of the float model, which a result folder does not hold: name the model with --source"
        )
    save_model(_onnx(job, job.teacher, "float"), path)
    check_model(path)
    return (), ()


def _pt2(job: Export, path: Path) -> Content:
    _save_program(job, path, lambda lowered, example: lowered)
    return (), ("loading it needs `import sqakd_fx.ir.integer_ops` first",)


def _pt2e(job: Export, path: Path) -> Content:
    _save_program(job, path, lambda lowered, x: decomposed(with_explicit_gates(lowered), x))
    return (), ("loading it needs `import torch.ao.quantization.fx._decomposed` first",)


def _litert(job: Export, path: Path) -> Content:
    _save_program(
        job, path, lambda lowered, x: quantized_weights(decomposed(with_explicit_gates(lowered), x))
    )
    return (), ("litert_torch.convert makes a .tflite file of it (docs/targets.md)",)


def _save_program(
    job: Export, path: Path, form: Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule]
) -> None:
    """A form of the integer program as a torch.export program."""
    example = _example(job)
    shapes = dynamic_shapes(example, _batch_axis(job), job.free_axes)
    save_program(form(job.lowered, example), example, path, shapes)


PROFILES: Mapping[str, tuple[str, Callable[[Export, Path], Content]]] = {
    "container": ("model.onnx", _container),
    "packed": ("model.packed.onnx", _packed),
    "typed": ("model.typed.onnx", _typed),
    "tensorrt": ("model.tensorrt.onnx", _tensorrt),
    "qonnx": ("model.qonnx.onnx", _qonnx),
    "encodings": ("model.encodings.onnx", _encodings),
    "float": ("model.float.onnx", _float),
    "pt2": ("model.pt2", _pt2),
    "pt2e": ("model.pt2e.pt2", _pt2e),
    "litert": ("model.litert.pt2", _litert),
}
"""Name to default file name and exporter."""


def _check_loads(path: Path, provider: str) -> None:
    """Raise ExportError where the target refuses the file, with what it says."""
    try:
        session(path, provider=provider)
    except ParityError as error:
        raise ExportError(f"{path.name} is not written: {error}") from error


def write_profile(
    profile: str, job: Export, path: Path, check: Callable[[Path], None] = lambda made: None
) -> Exported:
    """Write `path` in a profile, once `check` has let it pass; nothing half-written is left where it fails.

    Raises:
        ExportError: the program cannot be written in this profile, or the target refuses it. StorageError: the disk.
    """
    if profile not in PROFILES:
        raise ExportError(f"there is no profile {profile!r}: choose {', '.join(PROFILES)}")
    _, exporter = PROFILES[profile]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".export-{os.getpid()}-") as folder:
        made = Path(folder) / path.name
        weights, notes = exporter(job, made)
        if profile in _LOADED:
            _check_loads(made, job.provider)
        check(made)
        for file in sorted(Path(folder).iterdir(), key=lambda p: p.name == path.name):
            file.replace(path.parent / file.name)
    return Exported(path, tuple(weights), (*notes, *_without_form(job, profile, path.name)))


def _without_form(job: Export, profile: str, name: str) -> list[str]:
    """What the recipe asks for and the profile has no form for."""
    said = []
    if job.preprocess and profile not in _TAKE_BYTES:
        said.append(f"{name} takes floats: preprocess has no form in the profile {profile}")
    if job.int4_block and profile != "tensorrt":
        said.append(
            f"{name} has no INT4 blocks of {job.int4_block}: int4_block is for the target tensorrt"
        )
    return said
