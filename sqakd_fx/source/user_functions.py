"""The functions in the user's module, called, with their errors made readable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sqakd_fx.diagnostics.source_lines import user_line
from sqakd_fx.diagnostics.wording import with_article
from sqakd_fx.errors import SourceError, short
from sqakd_fx.frontend.example_call import arguments
from sqakd_fx.source.batches import Batch
from sqakd_fx.source.replay import replayable


@dataclass(frozen=True)
class UserFunctions:
    """Calls of the functions in the user's module, with their errors made readable."""

    module: ModuleType
    folder: Path

    def model(self, factory: Any, spec: str) -> nn.Module:
        if isinstance(factory, nn.Module):
            return factory
        name = getattr(factory, "__name__", spec)
        if not callable(factory):
            raise SourceError(
                f"{name} in {spec} is a {type(factory).__name__}, not a function: "
                "make it a function that returns the trained nn.Module"
            )
        made = self._call(name, factory)
        if isinstance(made, nn.Module):
            return made
        at = _definition(factory)
        given = (
            f"the class {made.__name__}"
            if isinstance(made, type)
            else with_article(type(made).__name__)
        )
        raise SourceError(
            f"{name}() in {at or spec} returned {given}, not an nn.Module: return the trained "
            "model itself",
            location=at,
        )

    def example(self) -> Batch | None:
        function = self._get("example_inputs")
        if function is None:
            return None
        value = self._value("example_inputs", function)
        args, kwargs = tree_map_only(np.ndarray, torch.from_numpy, arguments(value))
        args, kwargs = tree_map_only(Tensor, plain_tensor, (args, kwargs))
        if not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))):
            at = _definition(function)
            raise SourceError(
                f"example_inputs() in {at or self.module.__name__} returned "
                f"{with_article(type(value).__name__)} without a tensor: "
                "return a tensor, a tuple of tensors, or a dict of them",
                location=at,
            )
        return Batch(args, kwargs)

    def data(self, name: str) -> Iterable[Any] | None:
        function = self._get(name)
        if function is None:
            return None
        value = self._value(name, function)
        if not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
            at = _definition(function)
            given = "nothing" if value is None else with_article(type(value).__name__)
            raise SourceError(
                f"{name}() in {at or self.module.__name__} returned {given}: "
                "return a DataLoader, a Dataset, a tensor, or an iterable of batches",
                location=at,
            )
        data: Iterable[Any] = replayable(value)
        return data

    def metric(self) -> Callable[[Any, Any], float] | None:
        function = self._get("metric")
        if function is not None and not callable(function):
            raise SourceError(
                f"metric in {self.module.__file__} is a {type(function).__name__}: "
                "make it a function metric(outputs, targets) that returns a number"
            )
        return function  # type: ignore[no-any-return]

    def _get(self, name: str) -> Any:
        value = getattr(self.module, name, None)
        return None if isinstance(value, ModuleType) else value

    def _value(self, name: str, function: Any) -> Any:
        return self._call(name, function) if callable(function) else function

    def _call(self, name: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (Exception, SystemExit) as error:
            inside = user_line(error, self.folder)
            at = inside or _definition(function)
            place = f" at {at}" if at else ""
            advice = "correct that line" if inside else "make it callable without arguments"
            raise SourceError(
                f"{name}() failed with {short(error)}{place}: {advice}", location=at
            ) from error


def _definition(function: Any) -> str | None:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else None


def plain_tensor(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    return x.float() if x.is_floating_point() else x
