"""Models that cast to half precision inside: here they compute in float32 all the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_CASTS = {Tensor.half: Tensor.float, Tensor.bfloat16: Tensor.float}
_HALVES = (torch.float16, torch.bfloat16)


def _wider(value: Any) -> Any:
    is_half = isinstance(value, torch.dtype) and value in _HALVES
    return torch.float32 if is_half else value


class _Float32(TorchFunctionMode):
    """Takes every half-precision type that a call names for float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_wider, (args, kwargs or {}))
        return _CASTS.get(func, func)(*args, **kwargs)


@contextmanager
def in_float32() -> Iterator[None]:
    """Casts to half precision go to float32, and autocast does nothing."""
    autocast: Any = torch.amp.autocast_mode.autocast
    enter, leave = autocast.__enter__, autocast.__exit__
    autocast.__enter__, autocast.__exit__ = lambda self: self, lambda self, *error: None
    try:
        with _Float32():
            yield
    finally:
        autocast.__enter__, autocast.__exit__ = enter, leave


def cast_to_float32(graph: fx.Graph) -> None:
    """Casts to half precision that a traced graph holds go to float32."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target in ("half", "bfloat16"):
            node.target = "float"
        node.args = fx.node.map_aggregate(node.args, _wider)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _wider)
