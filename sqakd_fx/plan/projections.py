"""Projections: layers that carry a residual stream past other layers.

Where a stream changes its width, a convolution of one pixel (or a linear layer) takes it to the sum while a
block of layers computes what is added. Few bits there narrow all that later blocks can know of it, for a few
per cent of the work; networks of 2 and 1 bits are trained with them in float (PACT and SAWB, Choi 2019, section 3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

from torch import fx

from sqakd_fx.ir.op_table import Kind, Op
from sqakd_fx.ir.rewriting import constant_of

_LONGEST_BLOCK = 256
"""Operations of a block that are looked at: a search from every sum to the front would be quadratic."""


def projections(graph_module: fx.GraphModule, ops: Mapping[fx.Node, Op | None]) -> set[fx.Node]:
    """The layers of one pixel that read what a block of two or more layers reads, and whose output is added to its."""
    found = set()
    for node, op in ops.items():
        if op is None or op.kind is not Kind.SUM:
            continue
        operands = [x for x in node.args[:2] if isinstance(x, fx.Node)]
        if len(operands) < 2:
            continue
        for own, other in (operands, operands[::-1]):
            layer = _layer_behind(own, ops)
            if layer is None or not _is_of_one_pixel(graph_module, layer, ops):
                continue
            read = layer.args[0]
            assert isinstance(read, fx.Node)
            stream = back_through(read, {Kind.AVERAGE, Kind.TRANSPARENT, Kind.NOISE}, ops)
            if _layers_between(stream, other, layer, ops) >= 2:
                found.add(layer)
    return found


def _layer_behind(value: fx.Node, ops: Mapping[fx.Node, Op | None]) -> fx.Node | None:
    """The layer whose output this is, through BatchNorm and what only moves values."""
    value = back_through(value, {Kind.BATCH_NORM, Kind.TRANSPARENT}, ops)
    op = ops.get(value)
    return value if op is not None and op.kind is Kind.COMPUTE else None


def back_through(
    value: fx.Node, kinds: Collection[Kind], ops: Mapping[fx.Node, Op | None]
) -> fx.Node:
    """The first node in front of `value`, or itself, whose operation is of none of these kinds."""
    while (op := ops.get(value)) is not None and op.kind in kinds:
        before = value.args[0] if value.args else None
        if not isinstance(before, fx.Node):
            break
        value = before
    return value


def _is_of_one_pixel(
    graph_module: fx.GraphModule, layer: fx.Node, ops: Mapping[fx.Node, Op | None]
) -> bool:
    op = ops[layer]
    if op is None or op.weight is None or not isinstance(layer.args[0], fx.Node):
        return False
    weight = constant_of(graph_module, layer.args[op.weight])
    return weight is not None and all(size == 1 for size in weight.shape[2:])


def _layers_between(
    source: fx.Node, value: fx.Node, without: fx.Node, ops: Mapping[fx.Node, Op | None]
) -> int:
    """The fewest layers on a way from `source` to `value` that avoids `without`; 0 where none is found."""
    fewest = {value: 0}
    waiting = deque([value])
    while waiting and len(fewest) <= _LONGEST_BLOCK:
        node = waiting.popleft()
        if node is source:
            return fewest[node]
        op = ops.get(node)
        is_layer = op is not None and op.kind is Kind.COMPUTE
        count = fewest[node] + is_layer
        for before in node.all_input_nodes:
            if before is without or before.op == "get_attr":
                continue
            if before not in fewest or count < fewest[before]:
                fewest[before] = count
                (waiting.append if is_layer else waiting.appendleft)(before)
    return 0
