"""Outputs that join unlike parts along one axis, such as the boxes of a detector and the scores of their classes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from sqakd_fx.ir.op_table import Kind, Op, op_of, shape_of

Modules = Mapping[str, nn.Module]


def unlike_parts(node: fx.Node, modules: Modules) -> tuple[int, ...]:
    """Sizes of the parts that a graph joins to this value: values beside probabilities; none where all are alike."""
    return _joined(node, modules)[1]


def _joined(node: fx.Node, modules: Modules) -> tuple[int, tuple[int, ...]]:
    """The axis, counted from the last, and the sizes of unlike parts along it; (0, ()) for none."""
    op = op_of(node, modules)
    nothing: tuple[int, tuple[int, ...]] = (0, ())
    if op is None:
        return nothing
    sources = [one for one in node.all_input_nodes if shape_of(one) is not None]
    if op.concatenates and all(_has_as_many_axes(one, node) for one in sources):
        axis = _axis_of(node)
        natures = [_nature(one, modules) for one in sources]
        if len(set(natures)) > 1:
            sizes: list[int] = []
            for index, source in enumerate(sources):
                size = (shape_of(source) or ())[axis]
                if index and natures[index] == natures[index - 1]:
                    sizes[-1] += size
                else:
                    sizes.append(size)
            return axis, tuple(sizes)
        if not sources:
            return nothing
        inner = {_joined(one, modules) for one in sources}
        found = inner.pop() if len(inner) == 1 else nothing
        return found if found[0] != axis else nothing
    moved = node.args[0] if node.args else None
    if op.kind in (Kind.TRANSPARENT, Kind.NOISE) and isinstance(moved, fx.Node):
        ours, theirs = shape_of(node), shape_of(moved)
        axis, inner_sizes = _joined(moved, modules)
        kept = ours is not None and theirs is not None and inner_sizes
        if kept and (ours == theirs or _keeps_the_last_axis(op, axis, ours, theirs)):
            return axis, inner_sizes
    return nothing


def _has_as_many_axes(a: fx.Node, b: fx.Node) -> bool:
    return len(shape_of(a) or ()) == len(shape_of(b) or ())


def _keeps_the_last_axis(
    op: Op, axis: int, ours: tuple[int, ...] | None, theirs: tuple[int, ...] | None
) -> bool:
    return op.by_shape is not None and axis == -1 and (ours or ())[-1:] == (theirs or ())[-1:]


def _axis_of(node: fx.Node) -> int:
    said = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    axis = said if isinstance(said, int) else 0
    return axis - len(shape_of(node) or ()) if axis >= 0 else axis


def _nature(node: fx.Node, modules: Modules) -> str:
    """What the operation behind a part gives, behind what only moves it."""
    while node.all_input_nodes:
        op = op_of(node, modules)
        if op is None:
            return "values"
        if op.gives is not None:
            return str(op.gives)
        if op.kind is Kind.JOINT:
            found = {_nature(one, modules) for one in node.all_input_nodes}
            return found.pop() if len(found) == 1 else "several"
        if op.kind not in (Kind.TRANSPARENT, Kind.NOISE):
            return "values"
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return "values"
        node = source
    return "values"
