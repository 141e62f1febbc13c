"""What a call of F.pad adds to a tensor."""

from __future__ import annotations

import math
from typing import Any

from torch import fx


def pad_amounts(node: fx.Node) -> tuple[int, ...] | None:
    """What F.pad adds at each side, last axis first; None where it pads with other than 0 or -inf."""
    if node.op != "call_function":
        return None
    amounts, mode = _argument(node, 1, "pad"), _argument(node, 2, "mode")
    constant = mode in (None, "constant", 0, 0.0) and pad_value(node) in (0.0, -math.inf)
    if not constant or not isinstance(amounts, list | tuple):
        return None
    return tuple(amounts) if all(isinstance(a, int) for a in amounts) else None


def pad_value(node: fx.Node) -> float:
    """What F.pad pads with."""
    value = _argument(node, 3, "value")
    return float(value) if isinstance(value, int | float) else 0.0


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else None)
