"""Less memory for more time: a student in segments that keep only their inputs and are computed again.

A graph of n nodes becomes about sqrt(n) segments of sqrt(n) nodes. In the backward pass a segment runs a second time
to have what its gradients need; BatchNorm then takes the same batch statistics and leaves its running ones alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """Calls `student` in segments; it has the same modules and parameters and gives the same results."""

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__()
        self.student = student
        self.segments = nn.ModuleList()
        self.wiring: list[tuple[list[str], list[str]]] = []
        for module in student.modules():
            if getattr(module, "inplace", False):
                module.__dict__["inplace"] = False  # a segment needs its inputs again
        nodes = [n for n in student.graph.nodes if n.op not in ("placeholder", "output")]
        size = max(math.isqrt(len(nodes)), 1)
        for start in range(0, len(nodes), size):
            self._add(nodes[start : start + size])
        self.inputs = [n.name for n in student.graph.find_nodes(op="placeholder")]

    def _add(self, nodes: Sequence[fx.Node]) -> None:
        """One more segment: `nodes`, which follow one another in the graph."""
        inside = set(nodes)
        needed = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
        given = [n for n in nodes if any(user not in inside for user in n.users)]
        graph = fx.Graph()
        copies = {n: graph.placeholder(n.name) for n in needed}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if "inplace" in node.kwargs:
                copies[node].update_kwarg("inplace", False)
        graph.output(tuple(copies[n] for n in given))
        self.segments.append(fx.GraphModule(self.student, graph))
        self.wiring.append(([n.name for n in needed], [n.name for n in given]))

    def forward(self, *inputs: Any) -> Any:
        values = dict(zip(self.inputs, inputs, strict=True))
        for segment, (needed, given) in zip(self.segments, self.wiring, strict=True):
            outputs = checkpoint(
                segment,
                *(values[name] for name in needed),
                use_reentrant=False,
                context_fn=functools.partial(_contexts, segment),
            )
            values |= dict(zip(given, outputs, strict=True))
        (output,) = self.student.graph.find_nodes(op="output")
        return fx.map_arg(output.args[0], lambda node: values[node.name])


def _contexts(
    segment: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first and the second run of a segment."""
    return nullcontext(), _running_statistics_held(segment)


@contextmanager
def _running_statistics_held(segment: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training keeps its running statistics; its operations are the same ones."""
    norms = [module for module in segment.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
