"""Values that join unlike parts along one axis, such as the boxes of a detector and the scores of their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

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
            parts = _moved(node, op, found)
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


def _moved(node: fx.Node, op: Op, found: Mapping[fx.Node, Parts]) -> Parts | None:
    """The parts of what a node moves, where their axis stays in its place."""
    source = node.args[0] if node.args else None
    if op.kind not in (Kind.TRANSPARENT, Kind.NOISE) or not isinstance(source, fx.Node):
        return None
    parts, ours, theirs = found.get(source), shape_of(node), shape_of(source)
    if parts is None or ours is None or theirs is None:
        return None
    keeps_last = op.by_shape is not None and parts.axis == -1 and ours[-1:] == theirs[-1:]
    return parts if ours == theirs or keeps_last else None


def _count(node: fx.Node) -> int:
    return len(shape_of(node) or ())


def _axis_of(node: fx.Node) -> int:
    said = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    axis = said if isinstance(said, int) else 0
    return axis - _count(node) if axis >= 0 else axis
