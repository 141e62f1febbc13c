"""A graph cut into about sqrt(n) segments of sqrt(n) nodes, each a module of its own over the same parameters."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

from torch import fx, nn


def segmented(
    graph_module: fx.GraphModule, wrap: Callable[[fx.GraphModule], nn.Module]
) -> fx.GraphModule:
    """A graph that calls the segments one after another and computes what `graph_module` does.

    A segment is what `wrap` makes of its part of the graph: it takes what other segments made and gives a
    tuple of what others read. Modules and parameters are shared with `graph_module`; a segment reads those
    it needs itself.
    """
    end = graph_module.graph.output_node()
    inputs = graph_module.graph.find_nodes(op="placeholder")
    inner = [
        node
        for node in graph_module.graph.nodes
        if node.op not in ("placeholder", "output") and (node.op != "get_attr" or end in node.users)
    ]
    graph, segments = fx.Graph(), nn.Module()
    values = {node: graph.node_copy(node) for node in inputs}
    size = max(math.isqrt(len(inner)), 1)
    for number, start in enumerate(range(0, len(inner), size)):
        module, needed, given = _segment(graph_module, inner[start : start + size])
        segments.add_module(f"segment_{number}", wrap(module))
        made = graph.call_module(f"segment_{number}", tuple(values[node] for node in needed))
        values |= {
            node: graph.call_function(operator.getitem, (made, index))
            for index, node in enumerate(given)
        }
    graph.node_copy(end, values.__getitem__)
    return fx.GraphModule(segments, graph)


def _segment(
    graph_module: fx.GraphModule, nodes: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """The segment of nodes that follow one another, what it reads of others, and what others read of it."""
    inside = set(nodes)
    read = dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in inside)
    needed = [node for node in read if node.op != "get_attr"]
    given = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in needed}
    copies |= {node: graph.node_copy(node) for node in read if node.op == "get_attr"}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in given))
    return fx.GraphModule(graph_module, graph), needed, given
