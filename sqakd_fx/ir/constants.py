"""What a graph computes of its parameters alone, before any input comes."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.ir import meta
from sqakd_fx.ir.aliasing import is_in_place
from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.op_table import RANDOM, VIEWS, shape_of
from sqakd_fx.ir.rewriting import get_attribute, insert_attribute

_LARGEST = 1 << 26


def is_computable(
    node: fx.Node, modules: Mapping[str, nn.Module], constants: Container[fx.Node]
) -> bool:
    """True for a call of torch's that reads constants alone, gives the same each time, and is not huge."""
    name = op_name(node, modules) or ""
    return (
        node.op in ("call_function", "call_method")
        and bool(name)
        and not name.startswith(RANDOM)
        and math.prod(shape_of(node) or ()) <= _LARGEST
        and all(source in constants for source in node.all_input_nodes)
    )


def compute(node: fx.Node, constants: Mapping[fx.Node, Any]) -> Any:
    """The value of a computable node; where it is a view it shares memory with its source."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), constants.__getitem__)
    called: Any = node.target
    with torch.no_grad():
        if node.op == "call_function":
            return called(*args, **kwargs)
        return getattr(args[0], called)(*args[1:], **kwargs)


def insert_constant(
    graph_module: fx.GraphModule,
    before: fx.Node,
    source: fx.Node,
    name: str,
    value: Tensor,
    *,
    trained: bool,
) -> fx.Node:
    """A stored tensor in place of what `source` computes: a parameter where it was made of one and is float."""
    trained = trained and value.is_floating_point()
    node = insert_attribute(graph_module, before, name, nn.Parameter(value) if trained else value)
    meta.set_module_path(node, meta.module_path(source))
    return node


def settle_changed_constants(graph_module: fx.GraphModule) -> None:
    """Compute what is made of parameters and changed in place, where a part is changed for the whole.

    Before:  bias = self.bias.clone(); bias[4:8].zero_(); y = linear(x, w, bias)
    After:   y = linear(x, w, bias_settled)               a parameter of its own, trained as it is

    A parameter that is changed itself is left alone, and so is memory that is changed after something
    that depends on an input has looked at it.
    """
    if not _changes_a_constant(graph_module):
        return
    seen = _Constants(graph_module)
    settled: dict[fx.Node, fx.Node] = {}
    for user, source in seen.reads:
        if not seen.is_settled(source):
            continue
        if source not in settled:
            settled[source] = insert_constant(
                graph_module,
                user,
                source,
                f"{source.name}_settled",
                seen.values[source].clone(),
                trained=source in seen.trained,
            )
        user.replace_input_with(source, settled[source])
    for node in reversed(seen.values):
        if settled and not node.users and (node.op == "get_attr" or seen.is_settled(node)):
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _changes_a_constant(graph_module: fx.GraphModule) -> bool:
    """Whether anything computable is changed in place; most models have no such change, and nothing is copied."""
    modules = dict(graph_module.named_modules())
    constants: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            constants.add(node)
        elif node.all_input_nodes and is_computable(node, modules, constants):
            if is_in_place(node, modules):
                return True
            constants.add(node)
    return False


class _Constants:
    """The values of all computable nodes, computed in order with memory shared, and who reads them.

    `reads` are pairs of a node that is not computable and a constant among its inputs.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.modules = dict(graph_module.named_modules())
        self.values: dict[fx.Node, Any] = {}
        self.trained: set[fx.Node] = set()
        self.reads: list[tuple[fx.Node, fx.Node]] = []
        self.changed: set[int] = set()
        self.closed: set[int] = set()
        """Memory that must not change any more: parameters, and what was read."""
        self.lost: set[int] = set()
        copies: dict[str, Any] = {}
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                value = get_attribute(graph_module, str(node.target))
                if isinstance(value, Tensor):
                    copy = copies.setdefault(str(node.target), value.detach().clone())
                    self.closed.add(_memory(copy))
                    self.values[node] = copy
                if isinstance(value, nn.Parameter):
                    self.trained.add(node)
            elif node.all_input_nodes:
                self._see(node)

    def is_settled(self, node: fx.Node) -> bool:
        """True for a tensor whose memory was changed, and never behind somebody's back."""
        value = self.values[node]
        return isinstance(value, Tensor) and _memory(value) in self.changed - self.lost

    def _see(self, node: fx.Node) -> None:
        known = [s for s in node.all_input_nodes if isinstance(self.values.get(s), Tensor)]
        memories = [_memory(self.values[source]) for source in known]
        computable = is_computable(node, self.modules, self.values)
        computable &= not self.lost.intersection(memories)
        first = node.all_input_nodes[0]
        if first in known and is_in_place(node, self.modules):
            self.changed.add(memories[0])
            if not computable or memories[0] in self.closed:
                self.lost.add(memories[0])
                return
        if computable:
            self.values[node] = compute(node, self.values)
            if self.trained.intersection(known):
                self.trained.add(node)
            return
        self.closed.update(memories)
        self.reads.extend((node, source) for source in known)
        if op_name(node, self.modules) in VIEWS:
            self.lost.update(memories)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
