"""Compute what depends on parameters alone, and on sizes that no batch changes.

    Before:  w = standardize(self.weight); y = conv(x, w)
    After:   y = conv(x, weight_standardize)            a parameter of its own, trained as it is

    Before:  y = x.reshape(x.size(0), x.size(1) * x.size(2))
    After:   y = x.reshape(x.size(0), 3136)

    Before:  y = x[:, self.start:]                  start is a buffer of one integer
    After:   y = x[:, 1:]

The batch size is asked of an input: a tensor whose size alone was wanted is not computed. So a weight that is sliced,
transposed, standardized or joined is a parameter like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sqakd_fx.ir import meta
from sqakd_fx.ir.constants import compute, insert_constant, is_computable
from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import constant_of, drop_unused, get_attribute, node_path


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what depends on parameters alone, and put numbers in place of sizes that no batch changes."""

    name = "fold_constants"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        changed = _fold_numbers(graph_module.graph)
        changed |= _fold_constants(graph_module, dict(graph_module.named_modules()))
        changed |= _fold_slice_bounds(graph_module)
        graph_module.graph.eliminate_dead_code()
        drop_unused(graph_module)
        return PassResult(graph_module, changed)


def _fold_numbers(graph: fx.Graph) -> bool:
    """Put the numbers that tracing found to be constant in the place of their nodes."""
    changed = False
    for node in list(graph.nodes):
        if meta.is_batch_size(node) and not _is_size_of_input(node):
            node.replace_all_uses_with(_batch_size(graph))
            changed = True
            continue
        value = meta.constant(node)
        if value is None or node.op not in ("call_function", "call_method"):
            continue

        def number(n: fx.Node, node: fx.Node = node, value: Any = value) -> Any:
            return value if n is node else n

        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), number)
        graph.erase_node(node)
        changed = True
    return changed


def _is_size_of_input(node: fx.Node) -> bool:
    return node.op == "call_method" and node.all_input_nodes[0].op == "placeholder"


def _batch_size(graph: fx.Graph) -> fx.Node:
    """x.size(0) of the first input that grows with the batch."""
    inputs = graph.find_nodes(op="placeholder")
    batched: fx.Node = next(node for node in inputs if 0 in meta.batch_axes(node))
    for user in batched.users:
        if user.op == "call_method" and (user.target, user.args[1:]) == ("size", (0,)):
            return user
    with graph.inserting_after(inputs[-1]):
        return graph.call_method("size", (batched, 0))


def _fold_constants(graph_module: fx.GraphModule, modules: dict[str, nn.Module]) -> bool:
    """What depends on parameters alone is computed now: a standardized or sliced weight, a mask.

    What is computed of the same parameter in the same way is one parameter.
    """
    constants: dict[fx.Node, Any] = {}
    folded: dict[str, fx.Node] = {}
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr":
            constants[node] = get_attribute(graph_module, str(node.target))
            continue
        sources = node.all_input_nodes
        if (
            shape_of(node) is None
            or not is_computable(node, modules, constants)
            or not all(isinstance(constants[source], torch.Tensor) for source in sources)
        ):
            continue
        how = _computed(node, constants)
        if how in folded:
            node.replace_all_uses_with(folded[how])
            graph_module.graph.erase_node(node)
            changed = True
            continue
        value = compute(node, constants)
        if not isinstance(value, torch.Tensor):
            continue
        value = value.detach().clone(memory_format=torch.contiguous_format)
        trained = any(isinstance(constants[source], nn.Parameter) for source in sources)
        stem = next((str(source.target) for source in sources), node_path(node))
        name = f"{stem}_{op_name(node, modules)}"
        constant = insert_constant(graph_module, node, node, name, value, trained=trained)
        constants[constant] = get_attribute(graph_module, str(constant.target))
        folded[how] = constant
        node.replace_all_uses_with(constant)
        graph_module.graph.erase_node(node)
        changed = True
    return changed


def _computed(node: fx.Node, constants: Mapping[fx.Node, Any]) -> str:
    """An operation with its arguments, constants by identity."""
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: f"@{id(constants[n])}")
    return f"{node.op} {node.target} {arguments}"


def _fold_slice_bounds(graph_module: fx.GraphModule) -> bool:
    """Bounds of a slice that are buffers of one integer become numbers: torch.export of torch 2.8 takes no others."""

    def bound(value: Any) -> Any:
        constant = constant_of(graph_module, value)
        if constant is None or constant.numel() != 1 or constant.is_floating_point():
            return value
        return int(constant)

    changed = False
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.target is not operator.getitem:
            continue
        index = node.args[1]
        if isinstance(index, list) and any(isinstance(entry, slice) for entry in index):
            index = tuple(index)  # as torch reads a list with slices in it
        entries = index if isinstance(index, tuple) else (index,)
        numbers = tuple(
            slice(bound(entry.start), bound(entry.stop), bound(entry.step))
            if isinstance(entry, slice)
            else entry
            for entry in entries
        )
        if numbers != entries:
            node.update_arg(1, numbers if isinstance(index, tuple) else numbers[0])
            changed = True
    return changed
