"""Small modules as graphs, printed as Python, and what stands in them."""

from __future__ import annotations

import re

from torch import Tensor, fx, nn

from sqakd_fx.frontend.trace import trace
from sqakd_fx.ir.pass_manager import Pass, run_passes


def traced(model: nn.Module, x: Tensor | tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph before any pass."""
    return trace(model.eval(), x).graph_module


def code(graph_module: fx.GraphModule) -> str:
    """The lines of a graph's forward, without what only sets free values that are no longer read."""
    lines = re.sub(r";  (\w+ = )+None$", "", graph_module.code.strip(), flags=re.MULTILINE)
    return "\n".join(line.strip() for line in lines.splitlines()[1:])


def calls(graph_module: fx.GraphModule) -> list[str]:
    """What the graph calls, in order."""
    return [
        getattr(n.target, "__name__", str(n.target))
        for n in graph_module.graph.nodes
        if n.op in ("call_function", "call_module", "call_method")
    ]


def before_and_after(model: nn.Module, x: Tensor, *passes: Pass) -> tuple[str, str]:
    """The graph as it is in front of the last of `passes`, and behind it; what it computes stays the same."""
    graph_module = run_passes(traced(model, x), passes[:-1]).graph_module
    before = code(graph_module)
    compiled = run_passes(graph_module, passes[-1:], probe=lambda graph: graph(x))
    assert compiled.log[0].difference is not None
    assert compiled.log[0].difference <= 1e-6
    return before, code(compiled.graph_module)
