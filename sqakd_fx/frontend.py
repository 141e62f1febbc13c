"""From a user's model to a torch.fx graph, with shapes and the place each node came from.

`torch.fx.symbolic_trace` is tried first, because it keeps the user's module names. A submodule that
it cannot trace stays whole, as a float island. Where the model's own forward cannot be traced, or
where islands would hold most of the parameters, `torch.export` gives an aten-level graph instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from sqakd_fx.attention import spell_out_attention
from sqakd_fx.calls import Call, call_of, two_samples
from sqakd_fx.compiler import largest_difference, tensors_of
from sqakd_fx.errors import TraceError
from sqakd_fx.tracer import (
    Tracer,
    asks_for_size,
    line_outside_torch,
    traceable_torch,
    unwrapped,
    wrapped_functions,
)

FrontEnd = Literal["auto", "symbolic", "export"]


@dataclass(frozen=True)
class Island:
    """A submodule that stays in float because it cannot be traced."""

    path: str
    reason: str
    location: str | None


@dataclass(frozen=True)
class Traced:
    """A float graph: one fx graph module in evaluation mode, its islands, and who traced it.

    `call` is the example. `decisions` are lines of the user's code that branch on data, where the example's branch was taken.
    """

    graph_module: fx.GraphModule
    call: Call
    islands: tuple[Island, ...]
    front_end: Literal["symbolic", "export"]
    decisions: tuple[str, ...] = ()


def trace(
    model: nn.Module,
    example_args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    front_end: FrontEnd = "auto",
    islands: Sequence[str] = (),
    decided: Sequence[str] = (),
) -> Traced:
    """Trace `model` (put in evaluation mode) and record every node's shape on the example.

    `islands` are paths of submodules to keep whole in float; `decided` are paths of submodules whose
    branches on data the example decides.

    The graph takes the tensors of a call by position, see `calls.py` for their names and order. Node
    metadata: `tensor_meta` and `module_path`.

    Raises:
        TraceError: neither front end can trace the model; names the line that stands in the way.
    """
    model = model.eval()
    call = call_of(model, example_args, example_kwargs or {})
    modules = dict(model.named_modules())
    for path in (*islands, *decided):
        if path not in modules:
            near = difflib.get_close_matches(path, modules, n=3, cutoff=0.4)
            raise TraceError(
                f"the recipe names a submodule {path!r} that the model has not: "
                + (f"did you mean {', '.join(near)}?" if near else "`sqakd-fx inspect` lists them")
            )
    _register_dataclasses(model, call)
    if front_end == "export":
        return _export(model, call, None)
    try:
        traced = _symbolic(model, call, islands, decided)
    except TraceError as error:
        if front_end == "symbolic":
            raise
        return _export(model, call, error)
    if front_end == "auto" and _island_share(traced) > 0.5:
        try:
            return _export(model, call, None)
        except TraceError:
            return traced
    return traced


def _register_dataclasses(model: nn.Module, call: Call) -> None:
    """Tell torch what is inside the dataclasses that the model returns."""
    args, kwargs = call.with_tensors(call.tensors())
    try:
        with torch.no_grad():
            pending = [model(*args, **kwargs)]
    except Exception as error:
        raise TraceError(
            f"the model does not run on the example inputs ({_short(error)}): check "
            "example_inputs() or --input-shape",
            location=_user_line(error),
        ) from error
    while pending:
        leaf = pending.pop()
        if isinstance(leaf, Tensor):
            continue
        kind = type(leaf)
        if dataclasses.is_dataclass(leaf) and kind not in torch.utils._pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(kind)
        leaves = torch.utils._pytree.tree_leaves(leaf)
        pending.extend(one for one in leaves if one is not leaf)


def _symbolic(
    model: nn.Module, call: Call, islands: Sequence[str], decided: Sequence[str]
) -> Traced:
    """Trace through functions that the user's code wraps (torch.fx.wrap) where that gives no island."""
    spell_out_attention(model)
    wrapped = wrapped_functions()
    if wrapped:
        try:
            with unwrapped(wrapped):
                traced = _with_islands(model, call, islands, decided)
        except TraceError:
            pass
        else:
            if len(traced.islands) == len(islands) and not traced.decisions:
                return traced
    return _with_islands(model, call, islands, decided)


def _with_islands(
    model: nn.Module, call: Call, wanted: Sequence[str], by_example: Sequence[str]
) -> Traced:
    """Trace with as few and as small islands as will do.

    An island that torch.export refuses could never be exported: it is traced after all, with the
    branches that the example takes.
    """
    islands = {path: Island(path, "the recipe keeps it whole", None) for path in wanted}
    decided = set(by_example)
    modules = dict(model.named_modules())
    inputs = tuple(call.tensors().values())
    while True:
        tracer = Tracer(call, frozenset(islands), frozenset(decided))
        try:
            with traceable_torch(tracer):
                graph = tracer.trace(model)
        except Exception as error:
            path, reason = _blame(error, tracer, modules)
            if not path or path in islands or path in decided:
                location = _user_line(error)
                raise TraceError(
                    f"the model's forward cannot be traced at {location or 'an unknown line'}: "
                    f"{reason}; move what depends on data into a submodule of its own, "
                    "or try --set frontend=export",
                    location=location,
                ) from error
            islands[path] = Island(path, reason, _user_line(error))
            continue
        graph_module = fx.GraphModule(tracer.root, graph, type(model).__name__)
        _drop_assertions(graph_module)
        try:
            propagate_shapes(graph_module, inputs)
        except Exception as error:
            raise TraceError(
                f"the traced graph does not run on the example inputs ({_short(error)}); "
                "the model's Python code depends on more than its inputs: try --set frontend=export"
            ) from error
        closed = [path for path in islands if not _can_be_exported(graph_module, path, inputs)]
        if closed:
            decided.update(closed)
            islands = {path: island for path, island in islands.items() if path not in closed}
            continue
        _compare_on_two_batches(model, graph_module, call)
        decisions = tuple(dict.fromkeys(tracer.decisions))
        return Traced(graph_module, call, tuple(islands.values()), "symbolic", decisions)


def _can_be_exported(graph_module: fx.GraphModule, path: str, inputs: Sequence[Any]) -> bool:
    """True where torch.export accepts the island on what it receives from the example."""
    received: list[tuple[Any, ...]] = []

    class Watch(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target == path:
                received.append((args, kwargs))
            return super().call_module(target, args, kwargs)

    with torch.no_grad():
        Watch(graph_module).run(*inputs)
    logging.disable(logging.CRITICAL)  # torch.export prints the graph that it gave up on
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for args, kwargs in received:
                torch.export.export(graph_module.get_submodule(path), args, kwargs)
    except Exception:
        return False
    finally:
        logging.disable(logging.NOTSET)
    return True


def _compare_on_two_batches(model: nn.Module, graph_module: fx.GraphModule, call: Call) -> None:
    """Raise TraceError where the graph is another function than the model, or of one batch size only.

    A number that is the same for both batch sizes is recorded as the node's `constant`.
    """
    once = call.tensors()
    batch = next((len(x) for x in once.values() if x.ndim), 0)
    twice = {
        name: torch.cat([x, x]) if x.ndim and len(x) == batch else x for name, x in once.items()
    }
    seen: list[dict[fx.Node, Any]] = []
    with torch.no_grad():
        for tensors in (once, twice):
            args, kwargs = call.with_tensors(tensors)
            try:
                wanted = tensors_of(model(*args, **kwargs))
            except Exception:
                continue  # a model for one batch size
            numbers = _Numbers(graph_module)
            try:
                difference = largest_difference(wanted, tensors_of(numbers.run(*tensors.values())))
            except Exception as error:
                raise TraceError(
                    f"the traced graph does not run on another batch size ({_short(error)}): "
                    "try --set frontend=export"
                ) from error
            if not difference <= 1e-3:
                raise TraceError(
                    f"the traced graph differs from the model by {difference:.1g}: its Python code "
                    "depends on more than its inputs; try --set frontend=export"
                )
            seen.append(numbers.found)
    if len(seen) == 2:
        for node, value in seen[0].items():
            if seen[1].get(node) == value:
                node.meta["constant"] = value


class _Numbers(fx.Interpreter):
    """Runs a graph and keeps the numbers that its nodes compute from sizes alone."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.found: dict[fx.Node, Any] = {}
        self.of_sizes: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        sources = n.all_input_nodes
        if asks_for_size(n) or (sources and all(s in self.of_sizes for s in sources)):
            self.of_sizes.add(n)
            if isinstance(value, int | float | torch.dtype):
                self.found[n] = value
        return value


def _drop_assertions(graph_module: fx.GraphModule) -> None:
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "call_function" and node.target is torch._assert and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _blame(error: Exception, tracer: Tracer, modules: dict[str, nn.Module]) -> tuple[str, str]:
    path = tracer.path[-1] if tracer.path else ""
    return (path if path in modules else ""), _short(error)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]


def _user_line(error: BaseException) -> str | None:
    return line_outside_torch(traceback.extract_tb(error.__traceback__))


def propagate_shapes(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Record every node's shape and dtype on one call's inputs."""
    with torch.no_grad():
        ShapeProp(graph_module).propagate(*inputs)


def _island_share(traced: Traced) -> float:
    total = sum(p.numel() for p in traced.graph_module.parameters()) or 1
    inside = sum(
        p.numel()
        for island in traced.islands
        for p in traced.graph_module.get_submodule(island.path).parameters()
    )
    return inside / total


class _Flat(nn.Module):
    """The model as a function of its named tensors, by position."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *tensors: Any) -> Any:
        args, kwargs = self.call.with_tensors(dict(zip(self.call.tensors(), tensors, strict=True)))
        return self.model(*args, **kwargs)


def _export(model: nn.Module, call: Call, cause: TraceError | None) -> Traced:
    call = two_samples(call)
    tensors = {name: x.clone() for name, x in call.tensors().items()}  # export guards a view's base
    batch = next((len(x) for x in tensors.values() if x.ndim), 0)
    dynamic = {0: torch.export.Dim.DYNAMIC}
    shapes = tuple(dynamic if x.ndim and len(x) == batch else None for x in tensors.values())
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                _Flat(model, call), tuple(tensors.values()), dynamic_shapes=(shapes,)
            )
        graph_module = program.module(check_guards=False)
        assert isinstance(graph_module, fx.GraphModule)
        _tidy(graph_module, list(tensors))
        graph_module = fx.GraphModule(graph_module, graph_module.graph, type(model).__name__)
        propagate_shapes(graph_module, tuple(tensors.values()))
        _compare_on_two_batches(model, graph_module, call)
    except Exception as error:
        location = cause.location if cause else _user_line(error)
        first = f"{cause} " if cause else ""
        raise TraceError(
            f"{first}torch.export cannot trace the model either ({_short(error)})"
            if cause
            else f"torch.export cannot trace the model ({_short(error)}): wrap the part that depends "
            "on data in a submodule and use --set frontend=symbolic",
            location=location,
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return Traced(graph_module, call, (), "export")


def _tidy(graph_module: fx.GraphModule, names: Sequence[str]) -> None:
    """Positional inputs of the call's names, module paths of the user's model, and no guards."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        node.meta["module_path"] = path.removeprefix("L__self__.").removeprefix("model").lstrip(".")
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        node.target = name
        node.name = name
    user: Any = graph_module.model
    del graph_module.model
    for name, value in list(vars(user).items()):
        if isinstance(value, Tensor):
            graph_module.register_buffer(name, value)
    for name, child in user.named_children():
        graph_module.add_module(name, child)
    for name, parameter in user.named_parameters(recurse=False):
        graph_module.register_parameter(name, parameter)
    for name, buffer in user.named_buffers(recurse=False):
        graph_module.register_buffer(name, buffer)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = str(node.target).removeprefix("model.")
    graph_module._forward_pre_hooks.clear()
    graph.set_codegen(fx.graph.CodeGen())
    graph_module.recompile()
