"""What a result folder holds for its report, read as data whose kinds are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from sqakd_fx.errors import StorageError
from sqakd_fx.exporters.packed import StoredWeight
from sqakd_fx.ir.pass_manager import Note
from sqakd_fx.mixed_precision.sensitivity import LayerSensitivity
from sqakd_fx.program import LayerFacts
from sqakd_fx.results.against_float import OutputDistance
from sqakd_fx.results.farthest import FarSample
from sqakd_fx.results.folder import settle
from sqakd_fx.results.tensors import TensorFacts
from sqakd_fx.storage import is_result_folder, read_json
from sqakd_fx.training.progress import StepReport

_Value = TypeVar("_Value")
_LARGEST = 100 * 2**20
"""Bytes of a text file that is read."""


@dataclass(frozen=True)
class Judgement:
    """The student on held-out samples."""

    agreement: float | None
    loss: float | None
    samples: int


@dataclass(frozen=True)
class Data:
    """What was trained on, and what was validated and compared on."""

    training: str
    batches: int
    batch_size: int
    evaluation: str | None


@dataclass(frozen=True)
class Searched:
    """An activation quantizer that the search for sensitive tensors measured."""

    quantizer: str
    errors: tuple[float, ...]
    in_float: bool


@dataclass(frozen=True)
class Search:
    """The search for sensitive tensors: by output what is tolerated, and the errors before and after it."""

    tolerances: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    tensors: tuple[Searched, ...]


@dataclass(frozen=True)
class Checked:
    """The verdict of the validation."""

    samples: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """report.json, as far as the page shows it."""

    name: str
    source: str
    recipe: str
    version: str
    torch: str
    onnxruntime: str
    date: str
    processor: str
    bits: str
    profile: str
    target: str
    seed: int
    outputs: tuple[OutputDistance, ...]
    layers: tuple[LayerFacts, ...]
    stored_weights: tuple[StoredWeight, ...]
    stays_in_float: tuple[Note, ...]
    validation: Checked
    seconds: Mapping[str, float]
    before_training: Judgement | None = None
    after_training: Judgement | None = None
    command: str | None = None
    system: str | None = None
    data: Data | None = None
    steps: int | None = None
    farthest_samples: tuple[FarSample, ...] = ()
    sensitive_tensors: Search | None = None
    training_notes: tuple[str, ...] = ()
    export_notes: tuple[str, ...] = ()
    validation_lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figures:
    """The keys of report.json that `results.figures` puts in words."""

    accuracy: dict[str, float | None] | None
    metric: str
    outputs: list[dict[str, Any]]
    float_onnx_bytes: int | None
    onnx_bytes: int
    nominal_weight_bytes: float
    float_ms: float | None
    integer_ms: float
    batch: int
    processor: str
    slower_than_float: str | None = None


@dataclass(frozen=True)
class Held:
    """A result folder.

    Attributes:
        raw: the keys of report.json that are put in words elsewhere, checked.
        steps: of the training, in order.
        files: bytes of the ONNX files, by name, with their external data.
    """

    folder: Path
    report: Report
    raw: dict[str, Any]
    steps: tuple[StepReport, ...]
    tensors: tuple[TensorFacts, ...]
    sensitivity: tuple[LayerSensitivity, ...]
    recipe: str
    files: Mapping[str, int] = field(default_factory=dict)


def read_held(folder: Path) -> Held:
    """What the folder holds.

    Raises:
        StorageError: it is no result folder of a finished run, or what it holds is damaged.
    """
    if not is_result_folder(folder):
        raise StorageError(
            f"{folder} is not a result folder: give one that `sqakd-fx quantize` made"
        )
    settle(folder)
    path = folder / "report.json"
    found = read_json(path)
    report, words = _checked(Report, found, path), _checked(Figures, found, path)
    raw = {name: getattr(words, name) for name in Figures.__dataclass_fields__}
    raw["layers"] = [vars(layer) for layer in report.layers]
    raw["validation"] = vars(report.validation)
    return Held(
        folder,
        report,
        raw | {"profile": report.profile, "outputs": [vars(one) for one in report.outputs]},
        tuple(_checked(StepReport, line, folder / "train.jsonl") for line in _lines(folder)),
        _list(folder / "tensors.json", tuple[TensorFacts, ...]),
        _list(folder / "sensitivity.json", tuple[LayerSensitivity, ...]),
        _text(folder / "recipe.toml"),
        _files(folder),
    )


def _checked(kind: Any, value: Any, path: Path) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise StorageError(
            f"{path} is damaged ({where}: {first['msg']}): run `sqakd-fx quantize` again"
        ) from None


def _list(path: Path, kind: type[_Value]) -> _Value:
    """The rows of a file that not every folder has."""
    found: _Value = _checked(kind, read_json(path) if path.is_file() else [], path)
    return found


def _lines(folder: Path) -> list[Any]:
    path = folder / "train.jsonl"
    try:
        return [json.loads(line) for line in _text(path).splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({error}): run `sqakd-fx quantize` again") from None


def _text(path: Path) -> str:
    """The text of a file; none where the file is missing or far too large."""
    try:
        small = path.is_file() and path.stat().st_size <= _LARGEST
        return path.read_text(encoding="utf-8", errors="replace") if small else ""
    except OSError:
        return ""


def _files(folder: Path) -> dict[str, int]:
    found = {}
    for path in sorted(folder.glob("*.onnx")):
        beside = path.with_name(f"{path.name}.data")
        found[path.name] = sum(one.stat().st_size for one in (path, beside) if one.is_file())
    return found
