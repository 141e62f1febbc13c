"""An einsum of two operands as one matrix product with axes moved.

einsum("bhid,bhjd->bhij", q, k)    permute(matmul(permute(q), permute(k)))
einsum("bnc,hcd->bhnd", x, W)      permute(unflatten(linear(x, W as a matrix)))
"""

from __future__ import annotations

import math
import string
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.rewriting import call_like, constant_of, insert_attribute, replace_node


class _Equation(NamedTuple):
    """The letters of the axes of both operands and of what they make."""

    left: str
    right: str
    out: str


def spell_out_einsum(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Replace an einsum that is a linear layer or a product of matrices; False where it is neither."""
    text = node.args[0]
    operands: Any = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    if not isinstance(text, str) or len(operands) != 2:
        return False
    equation = _equation(text.replace(" ", ""), operands)
    if equation is None:
        return False
    left, right, out = equation
    turned = _Equation(right, left, out)
    return (
        _as_linear(graph_module, node, equation, *operands)
        or _as_linear(graph_module, node, turned, operands[1], operands[0])
        or _as_product(graph_module, node, equation, *operands)
    )


def _equation(text: str, operands: Any) -> _Equation | None:
    """The equation with a letter for every axis; None where an axis is repeated, not named or broadcast."""
    terms, arrow, out = text.partition("->")
    left, comma, right = terms.partition(",")
    if not (arrow and comma):
        return None
    ranks = [len(shape_of(operand) or ()) for operand in operands]
    hidden = {
        rank - len(term) + 3
        for term, rank in zip((left, right), ranks, strict=True)
        if "..." in term
    }
    if len(hidden) > 1 or min(hidden, default=0) < 0:
        return None
    unused = [c for c in string.ascii_letters if c not in text]
    letters = "".join(unused[: hidden.pop() if hidden else 0])
    found = _Equation(*(term.replace("...", letters) for term in (left, right, out)))
    plain = all(len(set(term)) == len(term) and term.isalpha() for term in found)
    return found if plain and _have_one_size_a_letter(found, operands) else None


def _have_one_size_a_letter(equation: _Equation, operands: Any) -> bool:
    """False where an axis of size 1 stands for a longer one."""
    axes = [
        (letter, size)
        for term, operand in zip(equation, operands, strict=False)
        for letter, size in zip(term, shape_of(operand) or (), strict=False)
    ]
    return len(dict(axes)) == len(set(axes))


def _as_linear(
    graph_module: fx.GraphModule, node: fx.Node, equation: _Equation, x: Any, constant: Any
) -> bool:
    """Σ x[rows…, summed…] W[summed…, made…] with a constant W."""
    left, right, out = equation
    weight = constant_of(graph_module, constant)
    summed = [c for c in left if c in right]
    rows = [c for c in left if c not in right]
    made = [c for c in right if c not in left]
    if weight is None or not summed or not made or sorted(out) != sorted(rows + made):
        return False
    matrix = _as_matrix(weight.detach(), [right.index(c) for c in made + summed], len(made))
    name = f"{constant.target}_matrix"
    stored = insert_attribute(graph_module, node, name, nn.Parameter(matrix))
    sizes = [weight.shape[right.index(c)] for c in made]
    with graph_module.graph.inserting_before(node):
        x = call_like(graph_module, node, torch.permute, x, [left.index(c) for c in rows + summed])
        if len(summed) > 1:
            x = call_like(graph_module, node, torch.flatten, x, len(rows))
        y = call_like(graph_module, node, F.linear, x, stored, None)
        if len(made) > 1:
            y = call_like(graph_module, node, torch.unflatten, y, -1, sizes)
    layout = [(rows + made).index(c) for c in out]
    return replace_node(graph_module, node, torch.permute, (y, layout))


def _as_matrix(weight: Tensor, order: list[int], rows: int) -> Tensor:
    moved = weight.permute(order)
    return moved.reshape(math.prod(moved.shape[:rows]), -1).clone()


def _as_product(
    graph_module: fx.GraphModule, node: fx.Node, equation: _Equation, a: Any, b: Any
) -> bool:
    """Σ a[batch…, row, summed] b[batch…, summed, column]."""
    left, right, out = equation
    summed = [c for c in left if c in right and c not in out]
    batch = [c for c in left if c in right and c in out]
    rows = [c for c in left if c not in right]
    columns = [c for c in right if c not in left]
    made = batch + rows + columns
    if not (len(summed) == len(rows) == len(columns) == 1) or sorted(out) != sorted(made):
        return False
    with graph_module.graph.inserting_before(node):
        a, b = (
            call_like(graph_module, node, torch.permute, operand, [term.index(c) for c in order])
            for operand, term, order in (
                (a, left, batch + rows + summed),
                (b, right, batch + summed + columns),
            )
        )
        product = call_like(graph_module, node, torch.matmul, a, b)
    return replace_node(graph_module, node, torch.permute, (product, [made.index(c) for c in out]))
