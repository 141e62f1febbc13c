"""What a command's arguments may be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sqakd_fx.diagnostics.wording import did_you_mean
from sqakd_fx.errors import RecipeError, StorageError
from sqakd_fx.storage import is_result_folder


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Raise RecipeError where `value` is none of `choices`."""
    if value not in choices:
        hint = did_you_mean(value, choices, cutoff=0.4) or f"choose {', '.join(choices)}"
        raise RecipeError(f"{option} {value!r} is unknown: {hint}")


def result_of(target: Path) -> tuple[Path, Path]:
    """(result folder, ONNX file) of a folder or of a file in one."""
    folder = target.parent if target.suffix == ".onnx" else target
    path = target if target.suffix == ".onnx" else target / "model.onnx"
    if not is_result_folder(folder):
        raise StorageError(
            f"{folder} is not a result folder: give one that `sqakd-fx quantize` made"
        )
    if not path.is_file():
        raise StorageError(f"there is no {path}: run `sqakd-fx export` on the folder first")
    return folder, path


def refuse_without_source(folder: Path, given: Mapping[str, Any]) -> None:
    """Raise RecipeError where one of the options, by name, is given that only a source can follow."""
    for option, value in given.items():
        if value is not None and value != []:
            raise RecipeError(
                f"{option} asks the model again, and the result folder {folder} runs no Python code: name the model "
                "with --source as well"
            )


def default_file(profile: str, target: str | None, own: str) -> str:
    """What `export` writes in a result folder whose recipe has the target `own`."""
    if profile:
        from sqakd_fx.exporters.profiles import PROFILES

        return PROFILES[profile][0]
    return "model.onnx" if target in (None, own) else f"model.{target}.onnx"
