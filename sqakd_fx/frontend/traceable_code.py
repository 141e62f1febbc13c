"""The user's code while it is traced: calls that would turn a traced value into a number become nodes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx, nn

from sqakd_fx.frontend.symbolic import Tracer

_FACTORIES = (
    "tensor",
    "as_tensor",
    "asarray",
    "arange",
    "zeros",
    "ones",
    "full",
    "empty",
    "linspace",
    "eye",
    "rand",
    "randn",
)
_LIMITS = ("finfo", "iinfo")
_OF_LISTS = ("cat", "concat", "stack", "hstack", "vstack")
"""Which take a traced value for a list of tensors only in newer releases of torch."""


@contextlib.contextmanager
def traceable_code(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Calls that would turn a traced size into a number become nodes.

    These are torch.arange and its like, the functions of math, and `len` in the files that the model's classes
    come from. Functions of a list of tensors take a traced value for the list.
    """

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _has_proxy((args, kwargs)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def answered(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return function(*(tracer.answer(a.node) if _has_proxy(a) else a for a in args))

        return call

    def of_number(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nodes = [a.node for a in args if isinstance(a, fx.Proxy)]
            if any(map(tracer.has_input, nodes)) and not any(map(tracer.is_from_data, nodes)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def length(x: Any) -> Any:
        is_tensor = isinstance(x, fx.Proxy) and not tracer.computing
        return tracer.create_proxy("call_function", len, (x,), {}) if is_tensor else len(x)

    import torch._dynamo  # it keeps a list of torch's types when it is first imported: before ours stand in

    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_traced, [(vars(m), _kept(vars(m))) for m in model.modules()])
        for names, wrapped in ((_FACTORIES + _OF_LISTS, recorded), (_LIMITS, answered)):
            for name in names:
                original = getattr(torch, name)
                stack.callback(setattr, torch, name, original)
                setattr(torch, name, wrapped(original))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        files = _files_of(model)
        for names_of_file in files:
            if "len" not in names_of_file:
                stack.callback(names_of_file.pop, "len")
                names_of_file["len"] = length
        for names_of_file in (vars(math), *files):
            for name, function in list(names_of_file.items()):
                if isinstance(function, BuiltinFunctionType) and function.__module__ == "math":
                    stack.callback(names_of_file.__setitem__, name, function)
                    names_of_file[name] = of_number(function)
        yield


def _kept(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes, with lists and dicts as they are at the moment."""
    return {k: v.copy() if type(v) in (list, dict) else v for k, v in attributes.items()}


def _forget_traced(modules: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """What forward left in attributes while it was traced is as it was: the model itself runs again."""
    for attributes, kept in modules:
        for name, value in list(attributes.items()):
            if not _has_proxy(value):
                continue
            if name not in kept:
                del attributes[name]
            elif type(value) is list and type(kept[name]) is list:
                value[:] = kept[name]
            elif type(value) is dict and type(kept[name]) is dict:
                value.clear()
                value.update(kept[name])
            else:
                attributes[name] = kept[name]


def _files_of(model: nn.Module) -> list[dict[str, Any]]:
    """The global names of the user's files that define the model's modules."""
    found = {
        id(names): names
        for module in model.modules()
        for kind in type(module).__mro__
        if not kind.__module__.startswith("torch.")
        and (names := getattr(vars(kind).get("forward"), "__globals__", None)) is not None
    }
    return list(found.values())


_WRAPPED: dict[Any, Any] = fx._symbolic_trace._wrapped_fns_to_patch


def wrapped_functions() -> dict[Any, Any]:
    """Entries of torch.fx.wrap for Python functions outside torch."""
    found = {}
    for key, globals_ in _WRAPPED.items():
        function = globals_.get(key[1])
        if isinstance(function, FunctionType) and not function.__module__.startswith("torch."):
            found[key] = globals_
    return found


@contextlib.contextmanager
def unwrapped(entries: dict[Any, Any]) -> Iterator[None]:
    """Trace into functions that torch.fx.wrap would keep whole."""
    before = dict(_WRAPPED)
    for key in entries:
        del _WRAPPED[key]
    try:
        yield
    finally:
        _WRAPPED.clear()
        _WRAPPED.update(before)


def _has_proxy(arguments: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return any(isinstance(leaf, fx.Proxy) for leaf in leaves)
