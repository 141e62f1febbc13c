"""One call of a model as named tensors: every tensor in its arguments has a name of its own.

    forward(x, sizes, masks={"a": t}, scale=2.0)     x, sizes, masks_a          (scale is a constant)

Floating-point tensors are taken as float32. Nested tuples, lists and dicts are flattened in order; what is not a
tensor belongs to the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_map_with_path

from sqakd_fx.diagnostics.batch_errors import require_dense
from sqakd_fx.errors import TraceError
from sqakd_fx.frontend.plain_names import input_name
from sqakd_fx.recipe.free_axes import FreeAxes

Example: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""One call of a model: its one tensor, its positional arguments, or its arguments by name."""


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of an `Example`, without gradients; any other value is the one argument.

    Raises:
        SourceError: a tensor holds no values, or not all of them.
    """
    example = tree_map_only(Tensor, _plain, example)
    if isinstance(example, Mapping):
        return (), {str(name): value for name, value in example.items()}
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def _plain(x: Tensor) -> Tensor:
    require_dense(x, "example")
    return x.detach()


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model, the example that everything else is measured by.

    `free_axes` are those of each tensor whose sizes may be others in the next call.
    """

    signature: inspect.Signature
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    free_axes: FreeAxes = ()

    @property
    def n_inputs(self) -> int:
        """How many arguments the example gives to the model."""
        return len(self.args) + len(self.kwargs)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the example's arguments, in order: forward's own, then keyword arguments."""
        return (*named_parameters(self.signature)[: len(self.args)], *self.kwargs)

    @property
    def ndim(self) -> int:
        """Axes of the example's first tensor."""
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return next(x for x in leaves if isinstance(x, Tensor)).ndim

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in the order of the model's signature."""
        return _tensors(_bind(self.signature, self.args, self.kwargs))

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of another call, in the example's order.

        Raises:
            TraceError: an input is missing, or the call does not fit the model's signature.
        """
        given = _tensors(_bind(self.signature, args, kwargs))
        missing = [name for name in self.tensors() if name not in given]
        if missing:
            raise TraceError(
                f"the model's input {missing[0]!r} is missing from this batch: give it in the data"
            )
        return tuple(given[name] for name in self.tensors())

    def with_tensors(self, tensors: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the example with other values in place of its tensors."""
        bound = _bind(self.signature, self.args, self.kwargs)
        _visit(bound, lambda name, _: tensors[name])
        return bound.args, bound.kwargs


def call_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The example call of a model; raises TraceError where it does not fit the model's forward."""
    call = Call(inspect.signature(model.forward), tuple(args), dict(kwargs))
    call.tensors()
    return call


def named_parameters(signature: inspect.Signature) -> tuple[str, ...]:
    """The parameters of a signature but for *args and **kwargs."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(p.name for p in signature.parameters.values() if p.kind not in several)


def _bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(
            f"the inputs do not fit the model's forward{signature}: {error}; give example_inputs() "
            "as forward takes them"
        ) from error


def _tensors(bound: inspect.BoundArguments) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str, leaf: Tensor) -> Tensor:
        found[name] = leaf.float() if leaf.is_floating_point() else leaf
        return leaf

    _visit(bound, keep)
    return found


def _visit(bound: inspect.BoundArguments, replace: Callable[[str, Tensor], Any]) -> None:
    """Put replace(name, tensor) in the place of every tensor; names are of Python code, each its own."""
    taken: set[str] = set()

    def named(stem: list[str], path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        name = input_name("_".join([*stem, *map(key_name, path)]), taken)
        taken.add(name)
        return replace(name, leaf)

    for argument, value in list(bound.arguments.items()):
        kind = bound.signature.parameters[argument].kind
        stem = [] if kind is inspect.Parameter.VAR_KEYWORD else [argument]
        bound.arguments[argument] = tree_map_with_path(
            lambda path, leaf, stem=stem: named(stem, path, leaf), value
        )


def key_name(key: Any) -> str:
    """One step of a path into nested tuples, lists and dicts, as text."""
    for attribute in ("idx", "key", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def two_samples(call: Call) -> Call:
    """The call with every batched tensor's samples given twice where there is only one."""

    def doubled(x: Any) -> Any:
        single = isinstance(x, Tensor) and x.ndim and x.shape[0] == 1
        return torch.cat([x, x]) if single else x

    args, kwargs = call.with_tensors({k: doubled(v) for k, v in call.tensors().items()})
    return replace(call, args=args, kwargs=kwargs)
