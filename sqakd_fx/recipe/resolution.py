"""A recipe from what a run is told: a preset, then a file, then `--set key=value`, in this order; and as TOML.

The resolved recipe is saved with every result.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from sqakd_fx.diagnostics.wording import did_you_mean
from sqakd_fx.errors import RecipeError, UnknownFamilyError
from sqakd_fx.recipe.keys import Override, Recipe
from sqakd_fx.recipe.presets import preset_values
from sqakd_fx.targets import TARGETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_DEFAULT = "speed"
_SLOW_FAMILIES = ("ewgs", "qil")
_SLOW_RATE = 1e-5
"""Of their ranges where nothing else is said, as in the runs of EWGS's paper.

At a faster rate the range on the way in and the gain on the way out drift apart. ResNet-20 at W4A4 then loses 1.7
points within 195 steps (EWGS)."""


def resolve_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    bits: str | None = None,
    settings: Sequence[str] = (),
    **fields: Any,
) -> Recipe:
    """Build a recipe: preset or file, then `bits` ("w4a4"), then "key=value" settings, then fields.

    Without preset, file and bits it is the preset "speed". A file is TOML; its key `preset` names the preset that it
    starts from. Epochs that are asked for stand in place of a preset's steps.

    Raises:
        RecipeError: an unknown preset or key, or a value out of range.
        UnknownFamilyError: a family that is not registered (yet).
    """
    if isinstance(recipe, Recipe):
        values: dict[str, Any] = recipe.model_dump(exclude_none=True)
    elif isinstance(recipe, Mapping):
        values = _from_mapping(dict(recipe))
    elif recipe is None:
        values = preset_values(bits or _DEFAULT)
    elif str(recipe).endswith(".toml"):
        values = _from_mapping(read_toml(Path(recipe)))
    else:
        values = preset_values(str(recipe))
    if bits is not None:
        parsed = preset_values(bits)
        values |= {k: parsed[k] for k in ("weight_bits", "activation_bits")}
    changes = dict(map(parse_setting, settings))
    changes |= {key: value for key, value in fields.items() if value is not None}
    if "epochs" in changes and "steps" not in changes:
        values.pop("steps", None)
    values = _changed(values, changes)
    if any(values.get(f"{role}_family") in _SLOW_FAMILIES for role in ("weight", "activation")):
        values = {"quantizer_learning_rate": _SLOW_RATE} | values
    return validate(values)


_RENAMED_KEYS = {
    "decided": "specialize",
    "initialisation": "initialization",
    "islands": "float_modules",
    "thresholds": "activation_affine",
}
_RENAMED_VALUES = {("thresholds", "tensor"): "none"}


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the keys of earlier versions under their names, and a FutureWarning for each."""
    current = dict(values)
    for old in _RENAMED_KEYS.keys() & current.keys():
        new, value = _RENAMED_KEYS[old], current.pop(old)
        if new in current:
            raise RecipeError(
                f"the recipe has both {old!r} and {new!r}, its new name: keep {new!r}"
            )
        current[new] = _RENAMED_VALUES.get((old, value), value) if isinstance(value, str) else value
        warnings.warn(f"the recipe's key {old!r} is read as {new!r}", FutureWarning, stacklevel=4)
    return current


def _from_mapping(values: dict[str, Any]) -> dict[str, Any]:
    base = values.pop("preset", None)
    return _changed(preset_values(base) if base else {}, values)


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `values`; a decay of weights does not stand for one that is a part of the gradient."""
    changes = with_current_names(changes)
    before, after = (v.get("optimizer", "adam") for v in (values, values | changes))
    if (before == "adamw") != (after == "adamw"):
        values = {key: value for key, value in values.items() if key != "weight_decay"}
    return values | changes


def read_toml(path: Path) -> dict[str, Any]:
    """Raises RecipeError where a file is missing, no TOML, or no file."""
    if path.exists() and not path.is_file():
        raise RecipeError(f"the recipe {path} is not a file: name a TOML file")
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return values
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {path}: check --recipe") from None
    except OSError as error:
        raise RecipeError(f"the recipe file {path} cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe file {path} is not valid TOML: {error}") from None
    except RecursionError:
        raise RecipeError(
            f"the recipe file {path} is nested too deeply: no key of a recipe has more than three levels"
        ) from None


def parse_setting(text: str) -> tuple[str, Any]:
    """ "key=value" with the value in TOML, or a bare word."""
    key, sign, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not sign or not key:
        raise RecipeError(f"--set takes key=value, not {text!r}: for example --set weight_bits=4")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return key, value


def validate(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values; raises RecipeError with one sentence for what is wrong."""
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"] if not _is_type(part))
        if first["type"] == "extra_forbidden":
            known = list(
                Override.model_fields if first["loc"][0] == "override" else Recipe.model_fields
            )
            near = did_you_mean(str(first["loc"][-1]), known, cutoff=0.5)
            hint = near or "`sqakd-fx recipes` shows every key"
            raise RecipeError(f"the recipe has no key {path!r}: {hint}") from None
        kind = UnknownFamilyError if first["type"] == "family" else RecipeError
        raise kind(
            f"the recipe's {path} = {first['input']!r} does not fit: {_lower(first['msg'])}"
        ) from None
    profile = TARGETS[recipe.target].profile
    if profile is not None and recipe.profile != "container":
        raise RecipeError(
            f"the target {recipe.target} has a form of its own ({profile}): leave out profile = {recipe.profile!r}"
        )
    return recipe


def _is_type(part: int | str) -> bool:
    """Whether pydantic put the type of an alternative, such as constrained-float, among the keys."""
    return isinstance(part, str) and (part.startswith("constrained-") or "[" in part)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every key written out (absent optional ones left out)."""
    values = recipe.model_dump(exclude_none=True)
    overrides = values.pop("override")
    if overrides:
        values["override"] = [dict(one) for one in overrides]
    return tomli_w.dumps(values)
