"""The keys of a recipe for people: which values each takes, its default, and one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqakd_fx.recipe.keys import KNOWN_FAMILIES, LARGEST_COUNT, Override, Recipe

_TYPES = {
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "object": "table by name of an input or output",
}


@dataclass(frozen=True)
class Key:
    """A key of a recipe; `choices` are the words that it takes, where it takes words of a list."""

    name: str
    values: str
    default: str
    sentence: str
    choices: tuple[str, ...]


def recipe_keys() -> list[Key]:
    """Every key of a recipe in its order, then those of an override as "override.KEY"."""
    return [*_keys(Recipe, ""), *_keys(Override, "override.")]


def _keys(model: type[Recipe] | type[Override], prefix: str) -> list[Key]:
    schema = model.model_json_schema()
    required = schema.get("required", ())
    return [
        _key(f"{prefix}{name}", name in required, value)
        for name, value in schema["properties"].items()
    ]


def _key(name: str, required: bool, schema: Mapping[str, Any]) -> Key:
    forms = [form for form in schema.get("anyOf", [schema]) if form.get("type") != "null"]
    family = name.endswith("_family")
    choices = KNOWN_FAMILIES if family else tuple(w for form in forms for w in _words(form))
    kinds = ["a registered family"] if family else [_kind(f) for f in forms if not _words(f)]
    words = [f"one of {', '.join(choices)}"] if choices else []
    default = "required" if required else _default(schema.get("default"))
    return Key(name, ", or ".join([*words, *kinds]), default, schema["description"], choices)


def _words(form: Mapping[str, Any]) -> tuple[str, ...]:
    """The words that are taken, where they are a list."""
    return (str(form["const"]),) if "const" in form else tuple(map(str, form.get("enum", ())))


def _kind(form: Mapping[str, Any]) -> str:
    """Type and range."""
    if form.get("type") == "array":
        items = form["items"]
        return "list of tables" if "$ref" in items else f"list: {_kind(items)}"
    limits = _limits(form)
    return _TYPES[str(form["type"])] + (f" {limits}" if limits else "")


def _limits(form: Mapping[str, Any]) -> str:
    least, most = form.get("minimum"), form.get("maximum")
    above, below = form.get("exclusiveMinimum"), form.get("exclusiveMaximum")
    most = None if most is not None and most >= LARGEST_COUNT else most
    if least is not None and most is not None:
        return f"from {least} to {most}"
    parts = (
        f"from {least}" if least is not None else "",
        f"above {above}" if above is not None else "",
        f"below {below}" if below is not None else "",
        f"to {most:g}" if most is not None else "",
    )
    return " ".join(part for part in parts if part)


def _default(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value == [] else f"{value:g}" if isinstance(value, float) else str(value)
