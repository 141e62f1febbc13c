"""Read what was changed in place behind the change.

    Before:  y = x.add_(b); z = f(x)          After:  y = x.add_(b); z = f(y)

Later passes replace calls in place by calls that make a new tensor: from here on nobody reads the
old one. A change that is read through another view of the same memory is refused: the front end
hands such models to torch.export, which spells them out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from sqakd_fx.errors import PassError
from sqakd_fx.ir.aliasing import change_seen_elsewhere, is_in_place
from sqakd_fx.ir.pass_manager import Pass, PassResult


@dataclass(frozen=True)
class Functionalize(Pass):
    """Make whoever reads a tensor behind a change in place read the result of that change."""

    name = "functionalize"

    def requires(self, graph_module: fx.GraphModule) -> None:
        node = change_seen_elsewhere(graph_module.graph, dict(graph_module.named_modules()))
        if node is not None:
            raise PassError(f"{node.name} changes memory that another view reads", node=node.name)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        changed = _read_behind_changes_in_place(graph_module.graph, modules)
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, changed)


def _read_behind_changes_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Whoever reads a tensor after it was changed in place reads the change's result instead."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    changed = False
    for node in graph.nodes:
        if not is_in_place(node, modules) or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        for user in list(source.users):
            if position[user] > position[node]:
                user.replace_input_with(source, node)
                changed = True
    return changed
