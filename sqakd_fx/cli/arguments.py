"""What a command's arguments may be."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqakd_fx.diagnostics.terminal import say
from sqakd_fx.diagnostics.wording import did_you_mean
from sqakd_fx.errors import RecipeError, StorageError, UnknownFamilyError
from sqakd_fx.storage import is_result_folder

if TYPE_CHECKING:
    from sqakd_fx.recipe.keys import Recipe
    from sqakd_fx.source.source import Source
    from sqakd_fx.source.synthetic import DataFree
    from sqakd_fx.source.transform import Transform


@dataclass(frozen=True)
class DataOptions:
    """What the options say of the images and the sentences of --data."""

    name: str | None = None
    mean: str | None = None
    std: str | None = None
    resize: int | None = None
    crop: int | None = None
    tokenizer: str | None = None

    def transform(self) -> Transform | None:
        """The named transform with what the other options change of it; None where nothing is said."""
        from sqakd_fx.source.transform import Transform, named_transform

        said = {
            "mean": _numbers("--mean", self.mean),
            "std": _numbers("--std", self.std),
            "resize": self.resize,
            "crop": self.crop,
        }
        changes: dict[str, Any] = {key: value for key, value in said.items() if value is not None}
        if self.name is None and not changes:
            return None
        return replace(Transform() if self.name is None else named_transform(self.name), **changes)

    def given(self) -> dict[str, str | int | None]:
        """The options as they were written."""
        return {
            "--transform": self.name,
            "--mean": self.mean,
            "--std": self.std,
            "--resize": self.resize,
            "--crop": self.crop,
            "--tokenizer": self.tokenizer,
        }


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise RecipeError(f"{option} takes numbers like 0.485,0.456,0.406, not {text!r}")
    return numbers


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


def source_of(
    spec: str,
    weights: Path | None,
    data: Path | DataFree | None,
    shape: str | None,
    said: DataOptions | None = None,
) -> Source:
    """The model and data of the options; raises SqakdError."""
    from sqakd_fx.source.source import load_source

    return load_source(
        spec,
        weights=weights,
        data=data,
        input_shape=sizes_of(shape),
        transform=None if said is None else said.transform(),
        tokenizer=None if said is None else said.tokenizer,
    )


def data_of(data: Path | None, data_free: bool) -> Path | DataFree | None:
    """Where the inputs come from: a path, the model's own statistics, or the model's file."""
    if not data_free:
        return data
    if data is not None:
        raise RecipeError("--data-free makes inputs, and --data reads them: give one of them")
    from sqakd_fx.source.synthetic import DataFree

    return DataFree()


def sizes_of(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        sizes = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise RecipeError(f"--input-shape takes sizes like 1,3,224,224, not {text!r}") from None
    if min(sizes) < 1:
        raise RecipeError(f"--input-shape {text} has a size below 1: give positive sizes")
    return sizes


def dynamic_of(texts: list[str] | None) -> dict[str, dict[str, dict[str, int]]]:
    """The recipe's key `dynamic` as --dynamic says it, nothing where it says nothing; raises RecipeError."""
    if not texts:
        return {}
    found: dict[str, dict[str, int]] = {}
    for text in texts:
        name, sign, axes = text.rpartition(":")
        for part in axes.split(","):
            called, equals, axis = part.partition("=")
            if not equals or not axis.strip().isdigit():
                raise RecipeError(
                    f"--dynamic takes height=2,width=3, or INPUT:length=1 for one input, not {text!r}"
                )
            found.setdefault(name if sign else "*", {})[called.strip()] = int(axis)
    return {"dynamic": found}


def recipe_of(
    recipe: str | None, bits: str | None, settings: list[str] | None, **fields: Any
) -> Callable[[], Recipe]:
    """Gives the recipe of the options, once the model is loaded.

    A mistake is told before that, except a family that is not known: model.py may register it.
    """
    from sqakd_fx.recipe.resolution import resolve_recipe

    resolved = partial(resolve_recipe, recipe, bits=bits, settings=settings or (), **fields)
    with suppress(UnknownFamilyError), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", FutureWarning)
        resolved()
    for warning in told:
        say(f"note: {warning.message}", file=sys.stderr)
    warnings.filterwarnings("ignore", message="the recipe's key", category=FutureWarning)
    return resolved
