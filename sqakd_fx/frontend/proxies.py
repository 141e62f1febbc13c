"""Traced values: what Python code may do with them, as with the tensors that they stand for.

A value that no input decides is known while the model is traced: `item`, `tolist` and `numpy` give it, and so do `int`,
`float`, `str` and a key of a dict.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sqakd_fx.ir.op_table import op_of

READS = ("item", "tolist", "numpy")
"""Methods that give Python a tensor's values."""
_NAMED_VALUES = (bool, int, float, str, tuple, torch.dtype, torch.device)


class TracedValue(fx.Proxy):
    """A value in a trace, of whose size and constant values Python may ask."""

    tracer: Any

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__") and k.endswith("__"):  # a protocol that numpy or torch looks for
            raise AttributeError(k)
        return Attribute(self, k)

    def __len__(self) -> int:
        return len(self.tracer.example_of(self.node))

    def __getitem__(self, index: Any) -> Any:
        """x[index]; a slice of the parts of a tensor is a tuple of parts."""
        if isinstance(index, slice) and self._is_parts():
            return tuple(self[i] for i in range(len(self))[index])
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def _is_parts(self) -> bool:
        op = op_of(self.node, {}) if self.node.op in ("call_function", "call_method") else None
        return op is not None and op.gives_parts

    def __setitem__(self, index: Any, value: Any) -> None:
        """x[index] = value, as a new tensor that is called x from here on."""
        new = self.tracer.create_proxy("call_function", with_item, (self, index, value), {})
        self.node = new.node

    def __index__(self) -> int:
        return int(self.tracer.answer(self.node))

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.answer(self.node))

    def __rmul__(self, other: Any) -> Any:
        """[slice(None)] * x.dim() is a list."""
        if isinstance(other, list | tuple | str):
            return other * int(self)
        return self.tracer.create_proxy("call_function", operator.mul, (other, self), {})

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """What numpy's functions take in place of a tensor."""
        value = self.tracer.array(self.node)
        return np.asarray(value.numpy() if isinstance(value, Tensor) else value, dtype)

    def __hash__(self) -> int:
        """Of the value where it is a number, a name or a type: a key is then found in a dict."""
        if self.tracer.is_from_data(self.node):
            return id(self)
        value = self.tracer.example_of(self.node)
        return hash(value) if isinstance(value, _NAMED_VALUES) else id(self)

    def __str__(self) -> str:
        return (
            repr(self)
            if self.tracer.is_from_data(self.node)
            else str(self.tracer.answer(self.node))
        )

    def __format__(self, spec: str) -> str:
        if self.tracer.is_from_data(self.node):
            return repr(self)
        return format(self.tracer.answer(self.node), spec)


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of x with x[index] = value."""
    copy = x.clone()
    copy[index] = value
    return copy


class Attribute(TracedValue):
    """`x.shape` or the method `x.view`; becomes a node only when it is read."""

    def __init__(self, root: TracedValue, attr: str) -> None:
        self.root = root
        self.attr = attr
        self.tracer = root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            arguments = (self.root, self.attr)
            self._node = self.tracer.create_proxy("call_function", getattr, arguments, {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)
