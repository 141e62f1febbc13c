"""Bits for each layer under a budget: an integer programme, solved exactly by HiGHS.

minimize    Σ over layers of divergence[layer][bits]
subject to  one choice of bits for each layer,  Σ cost[layer][bits] <= budget
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from sqakd_fx.errors import RecipeError
from sqakd_fx.mixed_precision.sensitivity import LayerSensitivity
from sqakd_fx.recipe import Override, Recipe

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """`kind` "bits": mean weight bits over all weights; "size": bytes of the weights in a packed file."""

    kind: str
    limit: float

    def cost(self, layer: LayerSensitivity, bits: int, total: int) -> float:
        """What a choice adds to the sum that `limit` bounds; `total` is the number of weights."""
        if self.kind == "bits":
            return bits * layer.parameters / max(total, 1)
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
    options = [(layer, bits) for layer in weighted for bits in _options(layer)]
    cost = np.array([budget.cost(layer, bits, total) for layer, bits in options])
    owner = [index for index, layer in enumerate(weighted) for _ in _options(layer)]
    one_each = csr_array((np.ones(len(options)), (owner, range(len(options)))))
    least = sum(min(budget.cost(layer, b, total) for b in _options(layer)) for layer in weighted)
    if least > budget.limit * (1 + 1e-9):
        raise RecipeError(
            f"the budget {budget.kind}={budget.limit:g} is below {least:g}, what these layers need at "
            "the fewest bits: raise it, add smaller --candidates, or --set first_last=same and projections=same"
        )
    solved = milp(
        np.array([layer.divergence[bits] for layer, bits in options]),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost, ub=budget.limit * (1 + 1e-9)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise RecipeError(f"no choice of bits meets {budget.kind}={budget.limit:g}: raise it")
    return {layer.name: bits for (layer, bits), taken in zip(options, solved.x) if taken > 0.5}


def _options(layer: LayerSensitivity) -> list[int]:
    return [layer.weight_bits] if layer.is_fixed else list(layer.divergence)


def with_bits(recipe: Recipe, layers: Sequence[LayerSensitivity], bits: dict[str, int]) -> Recipe:
    """The recipe with an override for each layer whose bits were chosen, and weights stored in few bits."""
    chosen = [
        Override.model_validate(
            {"match": re.sub(r"([*?[])", r"[\1]", layer.name), "weight_bits": bits[layer.name]}
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
        sum(mean.cost(layer, width, weights) for layer, width in chosen),
        int(sum(size.cost(layer, width, weights) for layer, width in chosen)),
    )
