"""Functions that were put on a model, held to its copy."""

from __future__ import annotations

from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any

from torch import nn


def hold_to_copy(copied: nn.Module, copies: Mapping[int, Any]) -> None:
    """Hooks and functions of `copied` use copies of what they were made with; `copies` are by the id of the original.

    copy.deepcopy takes a function as it is, with all that its closure holds.
    """
    known: dict[int, Any] = {}
    for module in copied.modules():
        tables: list[dict[Any, Any]] = [
            module._forward_hooks,
            module._forward_pre_hooks,
            vars(module),
        ]
        for functions in tables:
            for name, value in list(functions.items()):
                if isinstance(value, FunctionType):
                    functions[name] = _rebound(value, copies, known)


def _rebound(function: FunctionType, copies: Mapping[int, Any], known: dict[int, Any]) -> Any:
    if id(function) in known:
        return known[id(function)]
    cells = tuple(CellType() for _ in function.__closure__ or ())
    new = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    known[id(function)] = new

    def copied(value: Any) -> Any:
        if isinstance(value, FunctionType) and value.__closure__:
            return _rebound(value, copies, known)
        return copies.get(id(value), value)

    new.__defaults__ = tuple(map(copied, function.__defaults__ or ())) or None
    defaults = (function.__kwdefaults__ or {}).items()
    new.__kwdefaults__ = {name: copied(value) for name, value in defaults}
    new.__dict__.update(function.__dict__)
    for cell, made in zip(function.__closure__ or (), cells, strict=True):
        try:
            made.cell_contents = copied(cell.cell_contents)
        except ValueError:  # a name that has no value yet
            continue
    return new
