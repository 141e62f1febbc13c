"""Values that join unlike parts along one axis, such as the boxes of a detector and the scores of their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.ir.op_table import Kind, Op, op_of, shape_of


@dataclass(frozen=True)
class Parts:
    """Sizes of unlike parts along an axis, which is counted from the last, and what each is."""

    axis: int
    sizes: tuple[int, ...]
    natures: tuple[str, ...]


def unlike_parts(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, Parts]:
    """What nodes join that is unlike, values beside probabilities; nodes whose parts are alike are left out."""
    natures: dict[fx.Node, str] = {}
    found: dict[fx.Node, Parts] = {}
    for node in graph.nodes:
        op = op_of(node, modules)
        natures[node] = _nature(node, op, natures)
        sources = [one for one in node.all_input_nodes if shape_of(one) is not None]
        if op is None or not sources:
            continue
        if op.concatenates and all(_count(one) == _count(node) for one in sources):
            parts = _of_join(node, sources, natures, found)
        else:
            parts = _moved(node, op, found, modules)
        if parts is not None:
            found[node] = parts
    return found


def _nature(node: fx.Node, op: Op | None, natures: Mapping[fx.Node, str]) -> str:
    """What the operation behind a value gives, behind what only moves it."""
    if op is None or not node.all_input_nodes:
        return "values"
    if op.gives is not None:
        return op.gives
    if op.kind is Kind.JOINT:
        joined = {natures[one] for one in node.all_input_nodes}
        return joined.pop() if len(joined) == 1 else "several"
    source = node.args[0] if node.args else None
    moves = op.kind in (Kind.TRANSPARENT, Kind.NOISE) and isinstance(source, fx.Node)
    return natures[source] if moves else "values"  # type: ignore[index]


def _of_join(
    node: fx.Node,
    sources: Sequence[fx.Node],
    natures: Mapping[fx.Node, str],
    found: Mapping[fx.Node, Parts],
) -> Parts | None:
    """The parts that a node joins, or those that all of its alike parts have along another axis."""
    axis = _axis_of(node)
    if len({natures[one] for one in sources}) == 1:
        inner = {found.get(one) for one in sources}
        common = inner.pop() if len(inner) == 1 else None
        return common if common is not None and common.axis != axis else None
    sizes: list[int] = []
    kinds: list[str] = []
    for source in sources:
        size = (shape_of(source) or ())[axis]
        if kinds and natures[source] == kinds[-1]:
            sizes[-1] += size
        else:
            sizes.append(size)
            kinds.append(natures[source])
    return Parts(axis, tuple(sizes), tuple(kinds))


def _moved(
    node: fx.Node, op: Op, found: Mapping[fx.Node, Parts], modules: Mapping[str, nn.Module]
) -> Parts | None:
    """The parts of what a node moves, along the axis where it puts theirs."""
    source = node.args[0] if node.args else None
    if op.kind not in (Kind.TRANSPARENT, Kind.NOISE) or not isinstance(source, fx.Node):
        return None
    parts, ours, theirs = found.get(source), shape_of(node), shape_of(source)
    if parts is None or ours is None or theirs is None:
        return None
    if ours == theirs and not op.permutes:
        return parts
    moved = _applied(node, op, _numbered(theirs, parts.axis), modules)
    for axis in range(-len(ours), 0):
        if ours[axis] == theirs[parts.axis] and torch.equal(moved, _numbered(ours, axis)):
            return replace(parts, axis=axis)
    return None


def _numbered(shape: tuple[int, ...], axis: int) -> Tensor:
    """The position along an axis of every value of a tensor."""
    behind = (1,) * (-1 - axis)
    return torch.arange(float(shape[axis])).reshape(-1, *behind).expand(shape)


def _applied(node: fx.Node, op: Op, value: Tensor, modules: Mapping[str, nn.Module]) -> Tensor:
    """What a node makes of a tensor in place of its input; none of it where other inputs have a say."""
    if op.by_shape is not None:
        return op.by_shape(value, shape_of(node) or ())
    if len(node.all_input_nodes) > 1:
        return value.new_empty(0)
    target: Any = node.target
    if node.op == "call_module":
        return modules[target](value)  # type: ignore[no-any-return]
    rest = node.args[1:]
    if node.op == "call_method":
        return getattr(value, target)(*rest, **node.kwargs)  # type: ignore[no-any-return]
    return target(value, *rest, **node.kwargs)  # type: ignore[no-any-return]


def _count(node: fx.Node) -> int:
    return len(shape_of(node) or ())


def _axis_of(node: fx.Node) -> int:
    said = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    axis = said if isinstance(said, int) else 0
    return axis - _count(node) if axis >= 0 else axis
