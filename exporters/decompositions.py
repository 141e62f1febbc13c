"""Operations taken apart for ONNX, without tracing the program again where each of them has one operation in its place.

torch's exporter traces a program a second time to take its operations apart, which is half of an export. What integer
programs hold of such operations is mostly another spelling of one that is written as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Operation, arguments, keyword arguments."""


def decomposing_where_needed(program: ExportedProgram) -> ExportedProgram:
    """The program; its `run_decompositions` traces again only where an operation has to be taken apart."""
    decompose = program.run_decompositions

    def run_decompositions(
        table: Container[Any] | None = None, *args: Any, **kwargs: Any
    ) -> ExportedProgram:
        _spell_otherwise(program.graph)
        if table is not None and not any(_must_go(n, table) for n in program.graph.nodes):
            return program
        taken_apart: ExportedProgram = decompose(table, *args, **kwargs)
        return taken_apart

    program.run_decompositions = run_decompositions  # type: ignore[method-assign]
    return program


def _spell_otherwise(graph: fx.Graph) -> None:
    """Every operation of `_OTHERWISE` as another one, and nothing that only checks the inputs of the trace."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
        elif node.target in _OTHERWISE:
            call = _OTHERWISE[node.target](node)
            if call is not None:
                node.target, node.args, node.kwargs = call


def _renamed(operation: Any) -> Callable[[fx.Node], Call]:
    return lambda node: (operation, node.args, dict(node.kwargs))


def _cast(node: fx.Node) -> Call:
    if node.meta["val"].dtype == node.args[0].meta["val"].dtype:  # type: ignore[union-attr]
        return _aten.clone.default, node.args[:1], {}
    return _aten._to_copy.default, node.args[:1], {"dtype": node.meta["val"].dtype}


def _reshape(node: fx.Node) -> Call | None:
    """To the same shape; None where more than one size is open."""
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if sizes.count(-1) > 1:
        return None
    return _aten.reshape.default, (node.args[0], sizes), {}


def _slice(node: fx.Node) -> Call | None:
    x, axis, start, length = node.args
    if not (isinstance(start, int) and isinstance(length, int) and start >= 0):
        return None
    return _aten.slice.Tensor, (x, axis, start, start + length), {}


_CASTS = (_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout)
_OTHERWISE: Mapping[Any, Callable[[fx.Node], Call | None]] = {
    _aten.__and__.Tensor: _renamed(_aten.bitwise_and.Tensor),
    _aten.__or__.Tensor: _renamed(_aten.bitwise_or.Tensor),
    _aten.__xor__.Tensor: _renamed(_aten.bitwise_xor.Tensor),
    _aten.min.other: _renamed(_aten.minimum.default),
    _aten.max.other: _renamed(_aten.maximum.default),
    _aten.flatten.using_ints: _reshape,
    _aten.unflatten.int: _reshape,
    _aten.narrow.default: _slice,
    **dict.fromkeys(_CASTS, _cast),
}


def _must_go(node: fx.Node, table: Container[Any]) -> bool:
    """Whether an operation is taken apart by the exporter's table, by torch itself, or changes its inputs."""
    if node.op in ("placeholder", "output"):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", None) != "_operator"
    if node.target in table or node.target._schema.is_mutable:
        return True
    return _is_composite(node.target) and node.target not in _written()


def _is_composite(operation: torch._ops.OpOverload) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return operation.namespace == "aten" and operation.has_kernel_for_dispatch_key(key)


@functools.cache
def _written() -> frozenset[Any]:
    """What has an ONNX form, or else is in the exporter's table."""
    offered = torch.export.default_decompositions(), torch._decomp.decomposition_table
    views = _aten.reshape.default, _aten.expand_as.default, _aten.contiguous.default
    return frozenset((*views, *offered[0], *offered[1]))
