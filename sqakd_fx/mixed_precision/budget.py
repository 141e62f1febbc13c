"""Bits for each layer under a budget: a multiple-choice knapsack (`knapsack.py`).

minimize    Σ over layers of divergence[layer][bits]
subject to  one choice of bits for each layer,  Σ cost[layer][bits] <= budget
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sqakd_fx.errors import RecipeError
from sqakd_fx.mixed_precision.knapsack import solve
from sqakd_fx.mixed_precision.sensitivity import LayerSensitivity
from sqakd_fx.recipe.keys import Override, Recipe

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """`kind` "bits": mean weight bits over all weights; "size": bytes of the weights in a packed file."""

    kind: str
    limit: float

    def cost(self, layer: LayerSensitivity, bits: int) -> int:
        """What a choice adds to the sum that is bounded: bits of the weights, or bytes in a packed file."""
        if self.kind == "bits":
            return bits * layer.parameters
        return math.ceil(stored_bits(bits) * layer.parameters / 8)


def stored_bits(bits: int) -> int:
    """Bits that a weight takes in a packed file: 2, 4 or 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def parse_budget(text: str) -> Budget:
    """ "bits=3.2" or "size=1.5MB"; raises RecipeError."""
    match = re.fullmatch(r"\s*(bits|size)\s*=\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = match[3].upper() if match else ""
    if match is None or (match[1] == "bits") != (unit == "") or unit not in ("", *_UNITS):
        raise RecipeError(f"--budget takes bits=3.2 or size=1.5MB, not {text!r}")
    try:
        return Budget(match[1], float(match[2]) * _UNITS.get(unit, 1))
    except ValueError:
        raise RecipeError(f"--budget: {match[2]!r} is no number") from None


def choose_bits(layers: Sequence[LayerSensitivity], budget: Budget) -> dict[str, int]:
    """Weight bits by layer name: the least total divergence that the budget allows.

    Raises:
        RecipeError: the budget is below what the fewest bits need.
    """
    weighted = [layer for layer in layers if layer.parameters]
    if not weighted:
        raise RecipeError("no quantized layer has a weight: there are no bits to choose")
    total = sum(layer.parameters for layer in weighted)
    limit = budget.limit * (1 + 1e-9) * (total if budget.kind == "bits" else 1)
    chosen = solve(
        [[layer.divergence[bits] for bits in _options(layer)] for layer in weighted],
        [[budget.cost(layer, bits) for bits in _options(layer)] for layer in weighted],
        limit,
    )
    if chosen is None:
        least = sum(min(budget.cost(layer, b) for b in _options(layer)) for layer in weighted)
        needed = least / total if budget.kind == "bits" else least
        raise RecipeError(
            f"the budget {budget.kind}={budget.limit:g} is below {needed:g}, what these layers need at "
            "the fewest bits: raise it, add smaller --candidates, or --set first_last=same and projections=same"
        )
    return {layer.name: _options(layer)[c] for layer, c in zip(weighted, chosen, strict=True)}


def _options(layer: LayerSensitivity) -> list[int]:
    return [layer.weight_bits] if layer.is_fixed else list(layer.divergence)


def with_bits(recipe: Recipe, layers: Sequence[LayerSensitivity], bits: dict[str, int]) -> Recipe:
    """The recipe with an override for each layer whose bits were chosen, and weights stored in few bits."""
    chosen = [
        Override.model_validate(
            {"match": layer.name, "exact": True, "weight_bits": bits[layer.name]}
        )
        for layer in layers
        if layer.name in bits and not layer.is_fixed
    ]
    name = f"{recipe.name}-mixed"
    overrides = (*recipe.override, *chosen)
    profile = "packed" if recipe.profile == "container" else recipe.profile
    return recipe.model_copy(update={"name": name, "override": overrides, "profile": profile})


def totals(layers: Sequence[LayerSensitivity], bits: dict[str, int]) -> tuple[float, int]:
    """(mean weight bits, bytes of the weights in a packed file) of a choice."""
    weights = sum(layer.parameters for layer in layers)
    mean, size = Budget("bits", 0), Budget("size", 0)
    chosen = [(layer, bits[layer.name]) for layer in layers if layer.parameters]
    return (
        sum(mean.cost(layer, width) for layer, width in chosen) / max(weights, 1),
        sum(size.cost(layer, width) for layer, width in chosen),
    )
