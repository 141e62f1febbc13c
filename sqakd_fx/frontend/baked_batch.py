"""Numbers that the example's batch size made, written as that size again.

    Traced at 2 samples:   y = x.reshape(20, 2, 4096)
    Traced at 6 samples:   y = x.reshape(20, 6, 4096)
    Made of both:          size = x.size(0); y = x.reshape(20, size, 4096)

Code that reads sizes as Python numbers leaves them in its graph. Models that were imported from ONNX do so where the
file computes a shape.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sqakd_fx.frontend.example_call import Call
from sqakd_fx.ir.batches import samples_in
from sqakd_fx.ir.rewriting import constant_of

TIMES = 3
"""Samples of the second trace, for one of the first."""


def more_samples(call: Call) -> Call:
    """The call with the samples of every batched tensor given `TIMES` times."""
    once = call.tensors()
    batch = _batch(once)
    repeated = {
        name: torch.cat([x] * TIMES) if x.ndim and len(x) == batch else x
        for name, x in once.items()
    }
    args, kwargs = call.with_tensors(repeated)
    return replace(call, args=args, kwargs=kwargs)


def open_batch(traced: fx.GraphModule, larger: fx.GraphModule, call: Call) -> bool:
    """Write numbers that differ between a graph and that of `more_samples` as sums of the batch size.

    False where the graphs differ in anything else, or in nothing; then nothing is changed.
    """
    graph = traced.graph
    if len(graph.nodes) != len(larger.graph.nodes):
        return False
    pairs = list(zip(graph.nodes, larger.graph.nodes, strict=True))
    same = dict(pairs)
    batch = _batch(call.tensors())
    found: list[tuple[fx.Node, list[tuple[int, int] | None]]] = []
    for node, other in pairs:
        if node.op != other.op or not _is_same_target(traced, node, larger, other):
            return False
        numbers = _numbers(node, other, same, batch)
        if numbers is None:
            return False
        if any(numbers):
            found.append((node, numbers))
    if not found:
        return False
    size = _size(graph, call, batch)
    for node, numbers in found:
        _rewrite(graph, node, numbers, size)
    traced.recompile()
    return True


def _is_same_target(
    traced: fx.GraphModule, node: fx.Node, larger: fx.GraphModule, other: fx.Node
) -> bool:
    if node.op != "get_attr":
        return str(node.target) == str(other.target)
    ours, theirs = constant_of(traced, node), constant_of(larger, other)
    return ours is not None and theirs is not None and _equal(ours, theirs)


def _batch(tensors: dict[str, Tensor]) -> int:
    return samples_in(tensors.values(), 0)


def _leaves(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    return found


def _numbers(
    node: fx.Node, other: fx.Node, same: dict[fx.Node, fx.Node], batch: int
) -> list[tuple[int, int] | None] | None:
    """For each leaf of the arguments (factor, rest) of a number that grows with the batch; None where other leaves
    differ."""
    ours, theirs = _leaves(node), _leaves(other)
    if len(ours) != len(theirs):
        return None
    found: list[tuple[int, int] | None] = []
    for a, b in zip(ours, theirs, strict=True):
        if type(a) is int and type(b) is int and a != b:
            factor, left = divmod(b - a, batch * (TIMES - 1))
            if left:
                return None
            found.append((factor, a - factor * batch))
        elif (same[a] is b) if isinstance(a, fx.Node) else (type(a) is type(b) and _equal(a, b)):
            found.append(None)
        else:
            return None
    return found


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def _size(graph: fx.Graph, call: Call, batch: int) -> fx.Node:
    """x.size(0) of the first input that has a batch."""
    names = {n for n, x in call.tensors().items() if x.ndim and len(x) == batch}
    inputs = graph.find_nodes(op="placeholder")
    batched = next(node for node in inputs if str(node.target) in names)
    with graph.inserting_after(inputs[-1]):
        return graph.call_method("size", (batched, 0))


def _rewrite(
    graph: fx.Graph, node: fx.Node, numbers: list[tuple[int, int] | None], size: fx.Node
) -> None:
    with graph.inserting_before(node):
        made: Iterator[fx.Node | None] = iter(
            [None if one is None else _sum(graph, size, *one) for one in numbers]
        )

    def with_size(leaf: Any) -> Any:
        written = next(made)
        return leaf if written is None else written

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), with_size)
    node.args, node.kwargs = args, kwargs


def _sum(graph: fx.Graph, size: fx.Node, factor: int, rest: int) -> fx.Node:
    made = size if factor == 1 else graph.call_function(operator.mul, (size, factor))
    return made if rest == 0 else graph.call_function(operator.add, (made, rest))
