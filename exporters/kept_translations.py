"""torch's table of ONNX translations, built once a process: torch builds it for every export, a second each."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_MODULE, _CLASS, _BUILDER = (
    "torch.onnx._internal.exporter._registration",
    "ONNXRegistry",
    "from_torchlib",
)


@contextlib.contextmanager
def kept_translations() -> Iterator[None]:
    """Inside, torch.onnx.export begins with a copy of the table that its first use here built.

    torch has no public place to hand a table over. Where a version keeps it elsewhere, every export builds its
    own, as without this.
    """
    try:
        holder = getattr(importlib.import_module(_MODULE), _CLASS)
        original = holder.__dict__[_BUILDER]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    setattr(holder, _BUILDER, staticmethod(_copies(getattr(holder, _BUILDER))))
    try:
        yield
    finally:
        setattr(holder, _BUILDER, original)


@functools.cache
def _copies(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def kept(operations: int, *args: Any, **kwargs: Any) -> Any:
        return build(*args, **kwargs)

    def table(*args: Any, **kwargs: Any) -> Any:
        # a library that is imported later brings operations whose translations the table then has
        whole = kept(len(torch._C._dispatch_get_all_op_names()), *args, **kwargs)
        mine = copy.copy(whole)  # an export adds its own translations to the lists in it
        mine.functions = {name: list(found) for name, found in whole.functions.items()}
        return mine

    return table
