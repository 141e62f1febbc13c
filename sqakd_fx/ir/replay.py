"""A graph with its values kept, so that what stands behind one node can be computed again."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


class Replay(fx.Interpreter):
    """The float graph with its values kept, so that a part of it can be computed again."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.modules = dict(graph_module.named_modules())
        self.nodes = list(graph_module.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.kept: dict[fx.Node, Any] = {}

    def remember(self, inputs: Sequence[Any]) -> Any:
        """Run on `inputs` and keep every value; returns the output."""
        output = self.run(*inputs)
        self.kept = dict(self.env)
        return output

    def again(self, changed: Sequence[fx.Node], compute: Callable[[fx.Node], Any]) -> Any:
        """The output where `compute` gives the values of the nodes in `changed`."""
        fresh: dict[fx.Node, Any] = {}
        self.env = ChainMap(fresh, self.kept)  # type: ignore[assignment]
        waiting = set(changed)
        output: Any = None
        last: dict[int, list[fx.Node]] = {}
        for node in self.nodes[min(self.position[node] for node in changed) :]:
            if node in waiting:
                fresh[node] = compute(node)
            elif any(source in fresh for source in node.all_input_nodes):
                fresh[node] = self.run_node(node)
            if node in fresh:
                end = max((self.position[user] for user in node.users), default=0)
                last.setdefault(end, []).append(node)
                output = fresh[node]
            for done in last.pop(self.position[node], ()):
                del fresh[done]
        return output
