"""A copy of a module that holds what copy.deepcopy refuses."""

from __future__ import annotations

import copy
import io
import queue
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType, GeneratorType, MappingProxyType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_SHARED = (
    ModuleType,
    GeneratorType,
    FrameType,
    MappingProxyType,
    ContextVar,
    memoryview,
    io.IOBase,
    threading.local,
    type(threading.Lock()),
    type(threading.RLock()),
    queue.SimpleQueue,
    torch.finfo,
    torch.iinfo,
)
"""Types without a copy, none of which holds a network's weights."""
_COPIED_WHOLE = (Tensor, str, bytes, int, float, complex, type(None), type)

M = TypeVar("M", bound=nn.Module)


def deep_copy(module: M, copies: dict[int, Any] | None = None) -> M:
    """As copy.deepcopy, but Python modules, locks, open files and the like are shared with the original.

    A tensor with a gradient history is copied without it. `copies` is filled with the copies by the id of the original.
    """
    memo = {} if copies is None else copies
    for value in _held_by(module):
        if isinstance(value, _SHARED):
            memo[id(value)] = value
        elif isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def _held_by(module: nn.Module) -> Iterator[Any]:
    """Each value that is reached through attributes and containers, once."""
    waiting: list[Any] = [module]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        waiting += _parts(value)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (*_COPIED_WHOLE, *_SHARED)):
        return []
    try:
        parts = list(vars(value).values())
    except TypeError:  # it has no attributes
        parts = []
    if isinstance(value, dict):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        parts += value
    return parts
