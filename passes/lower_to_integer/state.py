"""A student on its way to the integer program: what its nodes have become, and any of them as a float tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

import sqakd_fx.ir.integer_ops  # noqa: F401  (registers torch.ops.sqakd_fx)
from sqakd_fx.ir.op_table import Kind, is_read_by_max_pool, op_of
from sqakd_fx.ir.rewriting import constant_of, get_attribute
from sqakd_fx.passes.lower_to_integer.adaptive_pools import adaptive_max_pool_in_float
from sqakd_fx.passes.lower_to_integer.average_pools import rounds_up
from sqakd_fx.passes.lower_to_integer.builder import LoweredGraph
from sqakd_fx.passes.lower_to_integer.clips import Clip
from sqakd_fx.passes.lower_to_integer.values import Arithmetic, Codes, Layer, StoredGrid

_OPS = torch.ops.sqakd_fx


class Lowering:
    """The student, the graph that is built of it, and for each node so far what stands for it there.

    Attributes:
        values: codes, a layer or a sum that waits for its grid, a float node of the new graph, or, for what is
            stored, the student's own node.
        floats: the nodes of the new graph that give a student's node in float, each made once.
        grids: the grid of each activation quantizer, by its path.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        self.student = student
        self.modules = dict(student.named_modules())
        self.built = LoweredGraph()
        self.graph = self.built.module.graph
        self.values: dict[fx.Node, Any] = {}
        self.floats: dict[fx.Node, fx.Node] = {}
        self.grids: dict[str, StoredGrid] = {}

    def constant(self, node: Any) -> Tensor:
        """The tensor that a node of the student reads."""
        value = constant_of(self.student, node)
        assert value is not None
        return value.detach()

    def bring_module(self, node: fx.Node) -> None:
        """Take over the module that a node of the student calls, if it calls one."""
        if node.op == "call_module":
            self.built.bring_module(str(node.target), self.modules[str(node.target)])

    def float_of(self, node: fx.Node) -> fx.Node:
        """The float tensor of a student's node in the lowered graph."""
        if node not in self.floats:
            self.floats[node] = self._materialized(self.values[node])
        return self.floats[node]

    def copied(self, node: fx.Node) -> fx.Node:
        """A node of the student as it is, in float."""
        pooled = adaptive_max_pool_in_float(self.built, node, self.modules, self.float_of)
        if pooled is not None:
            pooled.meta = dict(node.meta)
            return pooled
        self.bring_module(node)
        new = self.graph.node_copy(node, self.float_of)
        new.meta = dict(node.meta)
        return self._unfused(node, new)

    def _materialized(self, value: Any) -> fx.Node:
        if isinstance(value, Codes):
            return self.graph.call_function(
                _OPS.dequantize.default,
                (value.node, *self.built.grid_parameters(value.stored)),
            )
        if isinstance(value, Layer):
            real = self.built.shaped(value, self.built.dequantized(value))
            return self._clipped(real, value.clip)
        if isinstance(value, Arithmetic):
            self.bring_module(value.source)
            return self._clipped(self.graph.node_copy(value.source, self.float_of), value.clip)
        assert isinstance(value, fx.Node)
        return value if value.graph is self.graph else self._stored(value)

    def _clipped(self, node: fx.Node, clip: Clip) -> fx.Node:
        if clip.is_open:
            return node
        lower = None if clip.lower == float("-inf") else clip.lower
        upper = None if clip.upper == float("inf") else clip.upper
        return self.graph.call_function(torch.clamp, (node, lower, upper))

    def _stored(self, node: fx.Node) -> fx.Node:
        """A get_attr, quantized weight or rounded bias that a float operation reads."""
        if node.op == "get_attr":
            tensor = get_attribute(self.student, str(node.target))
            return self.built.buffer(str(node.target), tensor.detach())
        module = self.modules[str(node.target)]
        inputs = [self.constant(argument) for argument in node.args]
        return self.built.buffer(f"{node.target}.value", module(*inputs).detach())

    def _unfused(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """A minimum with infinity behind what ONNX Runtime 1.31 would merge into a kernel that is wrong.

        A Pad with zeros becomes part of a MaxPool, which pads with -inf; an AveragePool with ceil_mode between
        DequantizeLinear and QuantizeLinear becomes QLinearAveragePool, which divides the last windows wrongly.
        """
        op = op_of(node, self.modules)
        windows = op is not None and op.kind is Kind.AVERAGE and op.axes and not op.adaptive
        averages = windows and rounds_up(node, self.modules)
        if not is_read_by_max_pool(node, self.modules) and not averages:
            return new
        infinity = self.built.buffer("infinity", torch.tensor(math.inf))
        return self.graph.call_function(torch.minimum, (new, infinity))
