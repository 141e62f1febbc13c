"""What the shell completes: presets, bits, and keys of a recipe with their values."""

from __future__ import annotations

from sqakd_fx.recipe.presets import preset_names


def presets_like(incomplete: str) -> list[str]:
    """Presets that begin so."""
    return [name for name in preset_names() if name.startswith(incomplete)]


def bits_like(incomplete: str) -> list[str]:
    """Bits that begin so."""
    return [name for name in preset_names() if "/" not in name and name.startswith(incomplete)]


def settings_like(incomplete: str) -> list[tuple[str, str]]:
    """KEY= with its sentence; behind the equals sign, the words that the key takes."""
    from sqakd_fx.cli.recipe_keys import recipe_keys

    key, sign, value = incomplete.partition("=")
    keys = [one for one in recipe_keys() if "." not in one.name and one.name != "override"]
    if not sign:
        return [(f"{one.name}=", one.sentence) for one in keys if one.name.startswith(key)]
    found = next((one for one in keys if one.name == key), None)
    if found is None:
        return []
    words = found.choices or (("true", "false") if found.values == "true or false" else ())
    return [(f"{key}={word}", found.sentence) for word in words if word.startswith(value)]
