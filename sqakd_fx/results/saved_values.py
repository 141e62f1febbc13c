"""Arguments of a graph's nodes as JSON: numbers, text, lists and the like, and names of other nodes.

list              [...]                     tuple          {"tuple": [...]}
a node's value    {"node": "conv"}          float32        {"dtype": "float32"}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx


class NotSaved(Exception):
    """A value, module or function that a file of data cannot hold; the message says what it is."""


def _named(kind: type[Any]) -> dict[str, Any]:
    return {name: value for name, value in vars(torch).items() if isinstance(value, kind)}


_CONSTANTS: Mapping[str, Mapping[str, Any]] = {
    "dtype": _named(torch.dtype),
    "layout": _named(torch.layout),
    "memory_format": _named(torch.memory_format),
}


def encode(value: Any) -> Any:
    """JSON for an argument; raises NotSaved."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(one) for one in value]}
    if isinstance(value, list):
        return [encode(one) for one in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(one)] for key, one in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(one) for one in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, known in _CONSTANTS.items():
        for name, one in known.items():
            if one is value:
                return {kind: name}
    raise NotSaved(f"holds an argument of type {type(value).__name__}")


def decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """What `encode` was given, with the nodes of another graph; raises ValueError or KeyError."""
    if isinstance(value, list):
        return [decode(one, nodes) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind in _CONSTANTS:
        return _CONSTANTS[kind][inner]
    if kind not in _DECODERS:
        raise ValueError(f"there is no kind of argument {kind!r}")
    return _DECODERS[kind](inner, nodes)


def _parts(inner: Any, nodes: Mapping[str, fx.Node]) -> list[Any]:
    if not isinstance(inner, list):
        raise ValueError(f"{str(inner)[:40]!r} is not a list")
    return [decode(one, nodes) for one in inner]


_DECODERS: Mapping[str, Callable[[Any, Mapping[str, fx.Node]], Any]] = {
    "node": lambda inner, nodes: nodes[inner],
    "float": lambda inner, nodes: float(inner),
    "tuple": lambda inner, nodes: tuple(_parts(inner, nodes)),
    "dict": lambda inner, nodes: {decode(key, nodes): decode(one, nodes) for key, one in inner},
    "slice": lambda inner, nodes: slice(*_parts(inner, nodes)),
    "ellipsis": lambda inner, nodes: Ellipsis,
    "complex": lambda inner, nodes: complex(float(inner[0]), float(inner[1])),
    "device": lambda inner, nodes: torch.device(str(inner)),
}
