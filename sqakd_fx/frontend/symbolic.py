"""Symbolic tracing that can look at the example when the model's Python code asks for a value.

torch.fx gives up where code branches on a tensor's size, loops over an axis or calls `int()` on a
size. This tracer answers such questions from one call on the example. A question about sizes is
answered silently; one about the values of the data only where the caller allows it for the module that
asks, because the answer is then part of the graph.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.source_lines import line_outside_torch
from sqakd_fx.frontend.example_call import Call
from sqakd_fx.frontend.plain_names import object_at
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_names import module_op_name
from sqakd_fx.ir.op_table import TABLE
from sqakd_fx.ir.size_queries import asks_for_size

_FACTORIES = ("arange", "zeros", "ones", "full", "empty", "linspace", "eye", "rand", "randn")
_LIMITS = ("finfo", "iinfo")


class DependsOnData(Exception):
    """Python code asks for a value that the data decides."""


class _Proxy(fx.Proxy):
    """A traced value whose size Python may ask for."""

    def __getattr__(self, k: str) -> Any:
        return _Attribute(self, k)

    def __len__(self) -> int:
        return len(self.tracer.example_of(self.node))  # type: ignore[attr-defined]

    def __setitem__(self, index: Any, value: Any) -> None:
        """x[index] = value, as a new tensor that is called x from here on."""
        new = self.tracer.create_proxy("call_function", with_item, (self, index, value), {})
        self.node = new.node

    def __index__(self) -> int:
        return int(self.tracer.answer(self.node))  # type: ignore[attr-defined]

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.answer(self.node))  # type: ignore[attr-defined]


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of x with x[index] = value."""
    copy = x.clone()
    copy[index] = value
    return copy


class _Attribute(_Proxy):
    """`x.shape` or the method `x.view`; becomes a node only when it is read."""

    def __init__(self, root: _Proxy, attr: str) -> None:
        self.root = root
        self.attr = attr
        self.tracer = root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            arguments = (self.root, self.attr)
            self._node = self.tracer.create_proxy("call_function", getattr, arguments, {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class Tracer(fx.Tracer):
    """Traces a model as a function of the tensors of its example call.

    Args:
        call: the example.
        float_modules: paths of submodules that stay whole.
        specialize: paths of submodules that may branch on data.

    After a failure `path` holds the module that was being traced, outermost first. `decisions` lists
    the lines of code whose branch on data follows the example.
    """

    record_stack_traces = True
    proxy_buffer_attributes = True

    def __init__(
        self, call: Call, float_modules: frozenset[str], specialize: frozenset[str]
    ) -> None:
        super().__init__()
        self.call = call
        self.example = call.tensors()
        self.float_modules = float_modules
        self.specialize = specialize
        self.path: list[str] = []
        self.decisions: list[str] = []
        self.values: dict[fx.Node, Any] = {}
        self.from_data: dict[fx.Node, bool] = {}
        self.computing = False

    # -- what fx asks ----------------------------------------------------------------------

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder a tensor; everything else in the example's arguments is a constant."""
        inputs = {n: self.create_proxy("placeholder", n, (), {}) for n in self.example}

        def forward(root: nn.Module) -> Any:
            args, kwargs = self.call.with_tensors(inputs)
            return root.forward(*args, **kwargs)

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
        meta.set_module_path(node, self.path[-1] if self.path else "")
        meta.set_is_module(node, node.op == "call_module")
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.answer(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(self.example_of(obj.node)))])  # type: ignore[index]

    # -- answers ---------------------------------------------------------------------------

    def answer(self, node: fx.Node) -> Any:
        """The node's value on the example; raises DependsOnData where that may not be asked."""
        if self._is_from_data(node):
            path = self.path[-1] if self.path else ""
            if not any(path == d or path.startswith(f"{d}.") or d == "" for d in self.specialize):
                raise DependsOnData("its Python code asks for a value that depends on the data")
            self.decisions.append(line_outside_torch(traceback.extract_stack()) or path)
        return self.example_of(node)

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

    def _is_from_data(self, node: fx.Node) -> bool:
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


@contextlib.contextmanager
def traceable_code(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Calls that would turn a traced size into a number become nodes.

    These are torch.arange and its like, and `len` in the files that the model's classes come from.
    """

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _has_proxy((args, kwargs)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def answered(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return function(
                *(tracer.answer(a.node) if isinstance(a, fx.Proxy) else a for a in args)
            )

        return call

    def length(x: Any) -> Any:
        is_tensor = isinstance(x, fx.Proxy) and not tracer.computing
        return tracer.create_proxy("call_function", len, (x,), {}) if is_tensor else len(x)

    import torch._dynamo  # it keeps a list of torch's types when it is first imported: before ours stand in

    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        for names, wrapped in ((_FACTORIES, recorded), (_LIMITS, answered)):
            for name in names:
                original = getattr(torch, name)
                stack.callback(setattr, torch, name, original)
                setattr(torch, name, wrapped(original))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        for names_of_file in _files_of(model):
            if "len" not in names_of_file:
                stack.callback(names_of_file.pop, "len")
                names_of_file["len"] = length
        yield


def _files_of(model: nn.Module) -> list[dict[str, Any]]:
    """The global names of the user's files that define the model's modules."""
    found = {
        id(names): names
        for module in model.modules()
        for kind in type(module).__mro__
        if not kind.__module__.startswith("torch.")
        and (names := getattr(vars(kind).get("forward"), "__globals__", None)) is not None
    }
    return list(found.values())


_WRAPPED: dict[Any, Any] = fx._symbolic_trace._wrapped_fns_to_patch


def wrapped_functions() -> dict[Any, Any]:
    """Entries of torch.fx.wrap for Python functions outside torch."""
    found = {}
    for key, globals_ in _WRAPPED.items():
        function = globals_.get(key[1])
        if isinstance(function, FunctionType) and not function.__module__.startswith("torch."):
            found[key] = globals_
    return found


@contextlib.contextmanager
def unwrapped(entries: dict[Any, Any]) -> Iterator[None]:
    """Trace into functions that torch.fx.wrap would keep whole."""
    before = dict(_WRAPPED)
    for key in entries:
        del _WRAPPED[key]
    try:
        yield
    finally:
        _WRAPPED.clear()
        _WRAPPED.update(before)


def _has_proxy(arguments: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return any(isinstance(leaf, fx.Proxy) for leaf in leaves)
