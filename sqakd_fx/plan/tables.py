"""Tables that rows are looked up in: embeddings whose weight is a parameter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from sqakd_fx.ir.op_table import Op
from sqakd_fx.ir.rewriting import constant_of, get_attribute
from sqakd_fx.ir.size_queries import depends_on_input

_ARGUMENTS = ("input", "weight", "padding_idx", "max_norm")


def table_target(
    graph_module: fx.GraphModule, node: fx.Node, ops: Mapping[fx.Node, Op | None]
) -> str | None:
    """The attribute that holds the table which a node looks rows up in; None for what is no plain look-up.

    One with `max_norm` changes its table while it is read. Where the indices are constant, or come from a size alone
    (positions), the rows are constants of the file.
    """
    op = ops.get(node)
    if op is None or not op.looks_up or not depends_on_input(looked_up(node)):
        return None
    if node.op == "call_module":
        module = get_attribute(graph_module, str(node.target))
        plain = type(module) is nn.Embedding and module.max_norm is None
        return f"{node.target}.weight" if plain else None
    given = dict(zip(_ARGUMENTS, node.args)) | node.kwargs
    weight = given.get("weight")
    if node.op != "call_function" or given.get("max_norm") is not None:
        return None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return str(weight.target) if constant_of(graph_module, weight) is not None else None


def looked_up(node: fx.Node) -> fx.Node:
    """The indices that a look-up reads."""
    value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return value
