"""The finest grid that an average deserves: what lies below it is rounding, not signal.

The average of what a normalization made zero-mean is 1e-9 of rounding in float and another value in integers. A
range of that size would make codes of noise. Of 2^16 steps of an average, its largest input is one end:

    scale >= max |input| / 2^16

For an input of 8 bits that is 1/512 of its step, while rounding the input alone moves an average of N values by a
step over sqrt(12 N): finer only from N = 20,000 up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqakd_fx.diagnostics.batch_errors import call
from sqakd_fx.ir.op_table import Kind, op_of

_FINEST = 2.0**-16


class AverageNoise:
    """Keeps the largest magnitude that each average of a student reads; `watching` is the graph to run for it."""

    def __init__(self, student: fx.GraphModule) -> None:
        modules = dict(student.named_modules())
        self.averages: dict[fx.Node, int] = {}
        for node in student.graph.nodes:
            op = op_of(node, modules)
            if op is not None and op.kind is Kind.AVERAGE:
                self.averages[node] = len(self.averages)
        self.watching = _with_peaks(student, list(self.averages)) if self.averages else student
        self.peaks: Tensor | None = None

    def run(self, inputs: tuple[Any, ...], how: Callable[..., Any] | None = None) -> None:
        """One batch; `how` runs `watching` on its inputs in another way than by a call."""
        found = call(self.watching, *inputs) if how is None else how(*inputs)
        if self.averages:
            self.peaks = found if self.peaks is None else torch.maximum(self.peaks, found)

    def least_scale(self, quantized: fx.Node) -> Tensor | None:
        """The smallest scale for a grid of this tensor, float32 of shape (); None where it is no average."""
        index = self.averages.get(quantized)
        return None if index is None or self.peaks is None else self.peaks[index] * _FINEST


def _with_peaks(student: fx.GraphModule, averages: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph over the same modules that returns the averages' largest |input|, float32 of shape (averages,)."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    peaks = []
    wanted = set(averages)
    for node in student.graph.nodes:
        if node.op == "output":
            continue
        if node in wanted:
            size = graph.call_method("abs", (copies[node.args[0]],))
            peaks.append(graph.call_method("float", (graph.call_method("amax", (size,)),)))
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(graph.call_function(torch.stack, (peaks,)))
    return fx.GraphModule(student, graph)
