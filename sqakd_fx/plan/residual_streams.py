"""Residual streams of transformers: chains of sums that normalizations read and that linear layers feed.

    x = x + f(norm(x))        or        x = norm(x + f(x))

A few channels of such a stream are hundreds of times larger than the others. One grid for all of them has no steps
left for the rest, and what is lost there is lost for every block behind it. In float the stream costs nothing: the
linear layer's integer accumulator is read as float, and the normalization is computed in float anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import networkx as nx
from torch import fx

from sqakd_fx.ir.op_table import Kind, Op, is_float32_tensor, shape_of
from sqakd_fx.plan.projections import back_through

REASON = (
    "part of a residual stream that normalizations read and linear layers feed "
    '(residual_streams = "integer" would quantize it)'
)
_MOVES = frozenset({Kind.TRANSPARENT, Kind.NOISE})
_DEEPEST_PRODUCT = 4


def residual_streams(ops: Mapping[fx.Node, Op | None]) -> set[fx.Node]:
    """The sums of residual streams, and what belongs to them.

    That is products which only such sums read (a scale or a gate of the branch), and the sums and products of
    normalizations that are spelt out.
    """
    sums = {node: tuple(_operands(node)) for node in ops if _is_sum(node, ops)}
    connected: nx.Graph[fx.Node] = nx.Graph()
    connected.add_nodes_from(sums)
    for node, operands in sums.items():
        for operand in operands:
            before = back_through(operand, _MOVES, ops)
            if before in sums:
                connected.add_edge(before, node)
    found: set[fx.Node] = set()
    for chain in nx.connected_components(connected):
        origins = [_origins(x, ops) for node in chain for x in sums[node]]
        linear = sum(any(not op.is_convolution for op in layers) for layers in origins)
        convolved = sum(any(op.is_convolution for op in layers) for layers in origins)
        if linear and linear >= convolved and any(_is_normalized(node, ops) for node in chain):
            found |= chain
    stream = found | {back_through(x, _MOVES, ops) for node in found for x in sums[node]}
    return found | _branch_products(found, ops) | _inside_normalizations(stream, ops)


def _is_sum(node: fx.Node, ops: Mapping[fx.Node, Op | None]) -> bool:
    op = ops[node]
    if op is None or op.kind is not Kind.SUM or not is_float32_tensor(node):
        return False
    operands = list(_operands(node))
    return len(operands) == 2 and all(map(is_float32_tensor, operands))


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    return (value for value in node.args[:2] if isinstance(value, fx.Node))


def _origins(
    value: fx.Node, ops: Mapping[fx.Node, Op | None], depth: int = _DEEPEST_PRODUCT
) -> set[Op]:
    """The layers that make a branch, through moves and products."""
    value = back_through(value, _MOVES, ops)
    op = ops.get(value)
    if op is None:
        return set()
    if op.kind is Kind.PRODUCT and depth:
        return {layer for x in _operands(value) for layer in _origins(x, ops, depth - 1)}
    return {op} if op.kind is Kind.COMPUTE else set()


def _is_normalized(node: fx.Node, ops: Mapping[fx.Node, Op | None]) -> bool:
    """Whether a normalization over the last axis reads a value, as one operation or spelt out."""
    for user in _readers(node, ops):
        op = ops[user]
        if op is None:
            continue
        if op.normalizes_features:
            return True
        squares = op.squares and len(set(user.all_input_nodes)) == 1
        if squares and any(_is_last_mean(reader, ops) for reader in _readers(user, ops)):
            return True
        if op.is_difference and any(_is_last_mean(x, ops) for x in user.all_input_nodes):
            return True
    return False


def _readers(node: fx.Node, ops: Mapping[fx.Node, Op | None]) -> Iterator[fx.Node]:
    """Who reads a value, as it is or moved."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        op = ops[user]
        if op is not None and op.kind in _MOVES:
            pending.extend(user.users)
        else:
            yield user


def _is_last_mean(node: fx.Node, ops: Mapping[fx.Node, Op | None]) -> bool:
    op = ops.get(node)
    if op is None or not op.is_mean:
        return False
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = [axes] if isinstance(axes, int) else axes
    rank = len(shape_of(node.all_input_nodes[0]) or ())
    return isinstance(axes, list | tuple) and [a % max(rank, 1) for a in axes] == [rank - 1]  # type: ignore[operator]


def _branch_products(found: set[fx.Node], ops: Mapping[fx.Node, Op | None]) -> set[fx.Node]:
    """Products, from the last backwards, that nobody reads but sums of a stream or such products."""
    products: set[fx.Node] = set()
    for node in reversed(list(ops)):
        op = ops[node]
        if op is None or op.kind is not Kind.PRODUCT:
            continue
        readers = set(_readers(node, ops))
        if readers and readers <= found | products:
            products.add(node)
    return products


def _inside_normalizations(stream: set[fx.Node], ops: Mapping[fx.Node, Op | None]) -> set[fx.Node]:
    """The arithmetic that reads a tensor of the stream in order to normalize it."""
    kinds = (Kind.SUM, Kind.PRODUCT)
    return {
        reader
        for node in stream
        if node in ops and _is_normalized(node, ops)
        for reader in _readers(node, ops)
        if (op := ops[reader]) is not None and op.kind in kinds
    }
