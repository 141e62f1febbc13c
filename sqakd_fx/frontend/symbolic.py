"""Symbolic tracing that can look at the example when the model's Python code asks for a value.

torch.fx gives up where code branches on a tensor's size, loops over an axis or calls `int()` on a
size. This tracer answers such questions from one call on the example. A question about sizes is
answered silently; one about the values of the data only where the caller allows it for the module that
asks, because the answer is then part of the graph.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from sqakd_fx.diagnostics.source_lines import line_outside_torch
from sqakd_fx.frontend.attention import zeroes_padding
from sqakd_fx.frontend.example_call import Call
from sqakd_fx.frontend.number_arguments import with_numbers
from sqakd_fx.frontend.plain_names import object_at
from sqakd_fx.frontend.proxies import READS, TracedValue
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_names import module_op_name
from sqakd_fx.ir.op_table import TABLE
from sqakd_fx.ir.size_queries import asks_for_size

_call_with_hooks: Any = fx._symbolic_trace._orig_module_call


_AXES = (slice, type(...))


class DependsOnData(Exception):
    """Python code asks for a value that the data decides."""


class LeavesTorch(DependsOnData):
    """Python code hands values that the data decides to numpy."""


@dataclass(frozen=True)
class FrozenParameter:
    """A line of the user's code that asks for the value of a parameter that is trained."""

    location: str
    parameter: str


class Tracer(fx.Tracer):
    """Traces a model as a function of the tensors of its example call.

    Args:
        call: the example.
        float_modules: paths of submodules that stay whole.
        specialize: paths of submodules that may branch on data.

    After a failure `path` holds the module that was being traced, outermost first. `decisions` lists
    the lines of code whose branch on data follows the example, `frozen` those that read a parameter as a number;
    `padded` are modules whose padded positions torch's fused path would make zero.
    """

    record_stack_traces = True
    proxy_buffer_attributes = True

    def __init__(
        self, call: Call, float_modules: frozenset[str], specialize: frozenset[str]
    ) -> None:
        nothing: Any = ()  # math is wrapped in traceable_code
        super().__init__(autowrap_modules=nothing)
        self.call = call
        self.example = call.tensors()
        self.float_modules = float_modules
        self.specialize = specialize
        self.path: list[str] = []
        self.decisions: list[str] = []
        self.frozen: list[FrozenParameter] = []
        self.padded: list[str] = []
        self.values: dict[fx.Node, Any] = {}
        self.from_data: dict[fx.Node, bool] = {}
        self.with_input: set[fx.Node] = set()
        self.computing = False

    # -- what fx asks ----------------------------------------------------------------------

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder a tensor; everything else in the example's arguments is a constant."""
        inputs = {n: self.create_proxy("placeholder", n, (), {}) for n in self.example}

        def forward(root: nn.Module) -> Any:
            args, kwargs = self.call.with_tensors(inputs)
            return _call_with_hooks(root, *args, **kwargs)

        return forward, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.float_modules or isinstance(m, torch.jit.ScriptModule):
            return True
        hooked = m._forward_hooks or m._forward_pre_hooks  # what they do belongs to the graph
        return module_op_name(m) in TABLE and not hooked

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.computing:
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:  # made inside a forward, as in nn.ReLU()(x)
            return forward(*args, **kwargs)
        if zeroes_padding(m, args, kwargs):
            self.padded.append(path)
        self.path.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)  # type: ignore[no-untyped-call]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        _index_by_tuple(node)
        meta.set_module_path(node, self.path[-1] if self.path else "")
        meta.set_is_module(node, node.op == "call_module")
        if node.op == "placeholder" or any(map(self.has_input, node.all_input_nodes)):
            self.with_input.add(node)
        return node

    # As many parameters as torch.fx gives it.
    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *more: Any,
        **options: Any,
    ) -> Any:
        """A traced value; of what no input decides, `item`, `tolist` and `numpy` give the value itself."""
        if kind in ("call_function", "call_method") and not self.computing:
            args, kwargs = with_numbers(target, args, kwargs, self._number)
        made: Any = super().create_proxy(kind, target, args, kwargs, *more, **options)
        if kind == "call_method" and target in READS:
            return self._read(made, target)
        return made

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, np.generic):
            return a.item()
        if isinstance(a, np.ndarray):
            a = torch.from_numpy(a) if a.ndim else a.item()
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TracedValue(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.answer(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(self.example_of(obj.node)))])  # type: ignore[index]

    # -- answers ---------------------------------------------------------------------------

    def _read(self, value: TracedValue, method: str) -> Any:
        """What a method of READS gives Python; a number that the batch or the data decides stays in the graph."""
        node = value.node
        source = node.all_input_nodes[0]
        if self.has_input(source) and method != "numpy":
            if method == "item" or self.is_from_data(source):
                return value
            self.graph.erase_node(node)
            return self._numbers(self.proxy(source))
        value = self.array(node) if method == "numpy" else self.answer(node)
        self.graph.erase_node(node)
        return value

    def array(self, node: fx.Node) -> Any:
        """The node's value, for numpy: what numpy computes of the data cannot be in a graph, whoever allows it."""
        if self.is_from_data(node):
            raise LeavesTorch("its Python code computes with numpy on the data")
        return self.answer(node)

    def _number(self, value: Any) -> Any:
        """A constant tensor of no axes as the number that it holds."""
        if not isinstance(value, TracedValue) or self.has_input(value.node):
            return value
        known = self.example_of(value.node)
        is_number = isinstance(known, torch.Tensor) and not known.ndim
        return self.answer(value.node).item() if is_number else value

    def _numbers(self, value: Any) -> Any:
        shape = self.example_of(value.node).shape
        return [self._numbers(value[i]) for i in range(shape[0])] if shape else value.item()

    def answer(self, node: fx.Node) -> Any:
        """The node's value on the example; raises DependsOnData where that may not be asked."""
        if self.is_from_data(node):
            path = self.path[-1] if self.path else ""
            if not any(path == d or path.startswith(f"{d}.") or d == "" for d in self.specialize):
                raise DependsOnData("its Python code asks for a value that depends on the data")
            self.decisions.append(self._line())
        elif names := parameters_in(node, self.root):
            line = self._line()
            self.frozen += [FrozenParameter(line, name) for name in names]
        return self.example_of(node)

    def _line(self) -> str:
        here = self.path[-1] if self.path else ""
        return line_outside_torch(traceback.extract_stack()) or here

    def example_of(self, node: fx.Node) -> Any:
        """The node's value on the example, of whatever kind."""
        if node not in self.values:
            self.computing = True
            try:
                with torch.no_grad():
                    for one in self.graph.nodes:
                        if one not in self.values:
                            self.values[one] = self._compute(one)
            finally:
                self.computing = False
        return self.values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.example[str(node.target)]
        if node.op == "get_attr":
            return object_at(self.root, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return object_at(self.root, str(node.target)).forward(*args, **kwargs)

    def has_input(self, node: fx.Node) -> bool:
        """True where an input, its values or only its size, reaches the node."""
        return node in self.with_input

    def is_from_data(self, node: fx.Node) -> bool:
        """True where the values of an input tensor, not only its size, reach the node."""
        pending = [node]
        while pending:
            one = pending[-1]
            if one in self.from_data:
                pending.pop()
                continue
            if one.op == "placeholder":
                self.from_data[one] = True
            elif asks_for_size(one):
                self.from_data[one] = False
            else:
                unknown = [source for source in one.all_input_nodes if source not in self.from_data]
                if unknown:
                    pending.extend(unknown)
                    continue
                self.from_data[one] = any(self.from_data[s] for s in one.all_input_nodes)
            pending.pop()
        return self.from_data[node]


def _index_by_tuple(node: fx.Node) -> None:
    """A list of slices as the tuple that torch reads it as, with a warning; later it will be one index of values."""
    index = node.args[1] if node.target in (operator.getitem, operator.setitem) else None
    if isinstance(index, list) and any(isinstance(x, _AXES) or x is None for x in index):
        node.update_arg(1, tuple(index))


def parameters_in(node: fx.Node, root: nn.Module) -> list[str]:
    """The trainable parameters whose values, not only their sizes, reach a node."""
    found: dict[str, None] = {}
    reaching: set[fx.Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if one in reaching or asks_for_size(one):
            continue
        reaching.add(one)
        pending.extend(one.all_input_nodes)
        target = str(one.target)
        if one.op == "get_attr":
            value = object_at(root, target)
            if isinstance(value, nn.Parameter) and value.requires_grad:
                found[target] = None
        elif one.op == "call_module":
            inside = object_at(root, target).named_parameters(target)
            found |= {name: None for name, parameter in inside if parameter.requires_grad}
    return list(found)
