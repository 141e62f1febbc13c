"""Which arguments of torch's operations are numbers and never tensors: `k` of topk, `dim` of softmax, sizes of view."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map

_NUMBERS_TOO = (("narrow", "Tensor"),)
"""Overloads whose tensor is nothing but a number."""


def with_numbers(
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    number: Callable[[Any], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call with number(leaf) in place of every leaf that the operation takes as a number."""
    places, names = _number_arguments(
        target if isinstance(target, str) else getattr(target, "__name__", "")
    )
    if not names:
        return args, dict(kwargs)
    last = len(places) - 1  # sizes may be given one by one: view(2, 3)
    given = [tree_map(number, x) if places[min(i, last)] else x for i, x in enumerate(args)]
    return tuple(given), {k: tree_map(number, v) if k in names else v for k, v in kwargs.items()}


@functools.cache
def _number_arguments(operation: str) -> tuple[tuple[bool, ...], frozenset[str]]:
    """By position and by name: the arguments of an ATen operation that are numbers in every overload."""
    packet: Any = getattr(torch.ops.aten, operation, None) if operation.isidentifier() else None
    if not hasattr(packet, "overloads"):
        return (), frozenset()
    schemas = [
        getattr(packet, name)._schema
        for name in packet.overloads()  # type: ignore[no-untyped-call]
        if "out" not in name and (operation, name) not in _NUMBERS_TOO
    ]
    by_position: list[bool] = []
    by_name: dict[str, bool] = {}
    for schema in schemas:
        for index, argument in enumerate(schema.arguments):
            is_number = not any(kind in str(argument.type) for kind in ("Tensor", "Generator"))
            by_position += [True] if index == len(by_position) else []
            by_position[index] &= is_number
            by_name[argument.name] = by_name.get(argument.name, True) and is_number
    names = frozenset(name for name, is_number in by_name.items() if is_number)
    return (tuple(by_position), names) if by_position else ((), frozenset())
