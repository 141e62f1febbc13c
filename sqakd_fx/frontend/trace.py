"""From a user's model to a torch.fx graph, with shapes and the place each node came from.

`torch.fx.symbolic_trace` is tried first, because it keeps the user's module names. A submodule that
it cannot trace stays whole, as a float module. Where the model's own forward cannot be traced, or
where float_modules would hold most of the parameters, `torch.export` gives an aten-level graph instead.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from sqakd_fx.diagnostics.quiet import silent_export
from sqakd_fx.diagnostics.source_lines import code_at, code_line, model_line
from sqakd_fx.diagnostics.wording import did_you_mean, with_article
from sqakd_fx.errors import TraceError, first_line
from sqakd_fx.frontend.attention import spell_out_attention
from sqakd_fx.frontend.baked_batch import more_samples, open_batch
from sqakd_fx.frontend.caches import caches_in, outputs_alone, without_caches
from sqakd_fx.frontend.example_call import Call, Example, arguments, call_of
from sqakd_fx.frontend.example_run import example_output
from sqakd_fx.frontend.float32 import cast_to_float32, in_float32
from sqakd_fx.frontend.inexpressible import NESTED, refuse_inexpressible, refuse_transforms
from sqakd_fx.frontend.other_sizes import require_other_sizes
from sqakd_fx.frontend.output_names import output_names
from sqakd_fx.frontend.plain_names import graph_module_of, plain_paths
from sqakd_fx.frontend.readable import line_of_forward, refuse_detector_inside
from sqakd_fx.frontend.symbolic import (
    DependsOnData,
    FrozenParameter,
    LeavesTorch,
    Tracer,
)
from sqakd_fx.frontend.torch_export import export_graph
from sqakd_fx.frontend.traceable_code import traceable_code, unwrapped, wrapped_functions
from sqakd_fx.frontend.verify import compare_on_two_batches
from sqakd_fx.ir import meta
from sqakd_fx.ir.aliasing import change_seen_elsewhere
from sqakd_fx.ir.constants import settle_changed_constants
from sqakd_fx.recipe.free_axes import Dynamic, free_axes

FrontEnd = Literal["auto", "symbolic", "export"]


@dataclass(frozen=True)
class FloatModule:
    """A submodule that stays in float because it cannot be traced."""

    path: str
    reason: str
    location: str | None


@dataclass(frozen=True)
class Traced:
    """A float graph: one fx graph module in evaluation mode, its float_modules, and who traced it.

    `call` is the example. `decisions` are lines of the user's code that branch on data, where the example's branch was
    taken; `frozen` are those that ask for a parameter's value, which stays what it was; `left_out` are outputs that no
    file gives; `padded` are modules that compute padded positions, which torch's fused path makes zero. With
    `fixed_batch` the model takes the example's batch size only.
    """

    graph_module: fx.GraphModule
    call: Call
    float_modules: tuple[FloatModule, ...]
    front_end: Literal["symbolic", "export"]
    decisions: tuple[str, ...] = ()
    frozen: tuple[FrozenParameter, ...] = ()
    left_out: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    fixed_batch: bool = False


def trace(
    model: nn.Module,
    example: Example,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    front_end: FrontEnd = "auto",
    float_modules: Sequence[str] = (),
    specialize: Sequence[str] = (),
    dynamic: Dynamic | None = None,
) -> Traced:
    """Trace `model` (put in evaluation mode) and record every node's shape on the example.

    `example` is one call: a tensor, a tuple of positional arguments (with `example_kwargs` beside them), or a dict of
    arguments by name. `float_modules` are paths of submodules to keep whole in float; `specialize` are paths of
    submodules whose branches on data the example decides. `dynamic` has axes whose sizes are free, by input.

    The graph takes the tensors of a call by position, see `example_call.py` for their names and order. Node
    metadata: `tensor_meta` and `module_path`, and the names of the outputs.

    Raises:
        TraceError: neither front end can trace the model; names the line that stands in the way.
    """
    model = model.eval()
    args, by_name = arguments(example)
    call = call_of(model, args, by_name | dict(example_kwargs or {}))
    if dynamic:
        shapes = {name: tuple(x.shape) for name, x in call.tensors().items()}
        call = replace(call, free_axes=free_axes(dynamic, shapes))
    modules = dict(model.named_modules())
    for path in (*float_modules, *specialize):
        if path not in modules:
            hint = did_you_mean(path, modules, cutoff=0.4) or "`sqakd-fx inspect` lists them"
            raise TraceError(
                f"the recipe names a submodule {path!r} that the model has not: {hint}"
            )
    _refuse_complex_inputs(call)
    if front_end == "export" and float_modules:
        raise TraceError(
            "frontend=export keeps no submodule whole, and the recipe's float_modules name "
            f"{', '.join(float_modules)}: leave out one of the two, or keep layers in float with "
            f'override = [{{match = "{float_modules[0]}*", float = true}}]'
        )
    output = example_output(model, call)
    require_other_sizes(model, call)
    caches = caches_in(output)
    with without_caches(model, caches):
        try:
            traced = _by_front_end(model, call, front_end, float_modules, specialize)
        except TraceError as error:
            refuse_detector_inside(model, error)
            raise
    refuse_transforms(traced.graph_module.graph)
    refuse_inexpressible(traced.graph_module)
    end = traced.graph_module.graph.output_node()
    meta.set_output_names(end, output_names(model, outputs_alone(output), call.tensors()))
    return replace(traced, left_out=caches)


def _by_front_end(
    model: nn.Module,
    call: Call,
    front_end: FrontEnd,
    float_modules: Sequence[str],
    specialize: Sequence[str],
) -> Traced:
    if front_end == "export":
        return _export(model, call, None)
    try:
        traced = _symbolic(model, call, float_modules, specialize)
    except TraceError as error:
        if front_end == "symbolic" or float_modules:
            without = " without float_modules" if float_modules else ""
            sentence = f"{error}, or try --set frontend=export{without}"
            raise TraceError(sentence, location=error.location) from error
        return _export(model, call, error)
    if front_end == "auto" and _float_module_share(traced, float_modules) > 0.5:
        try:
            return _export(model, call, None)
        except TraceError:
            return traced
    return traced


def _refuse_complex_inputs(call: Call) -> None:
    for name, tensor in call.tensors().items():
        if tensor.is_complex():
            raise TraceError(
                f"the input {name!r} is complex, which ONNX Runtime does not take: pass "
                "torch.view_as_real(...) and make it complex in the model's forward"
            )


def _symbolic(
    model: nn.Module, call: Call, float_modules: Sequence[str], specialize: Sequence[str]
) -> Traced:
    """Trace through functions that the user's code wraps (torch.fx.wrap) where that gives no float module."""
    spell_out_attention(model)
    wrapped = wrapped_functions()
    if wrapped:
        try:
            with unwrapped(wrapped):
                traced = _with_float_modules(model, call, float_modules, specialize)
        except TraceError:
            pass
        else:
            if len(traced.float_modules) == len(float_modules) and not traced.decisions:
                return traced
    return _with_float_modules(model, call, float_modules, specialize)


def _with_float_modules(
    model: nn.Module, call: Call, wanted: Sequence[str], by_example: Sequence[str]
) -> Traced:
    """Trace with as few and as small float_modules as will do.

    A float module that torch.export refuses could never be exported: it is traced after all, with the
    branches that the example takes.
    """
    float_modules = {path: FloatModule(path, "the recipe keeps it whole", None) for path in wanted}
    specialize = set(by_example)
    plain = plain_paths(model)
    modules = dict(model.named_modules())
    inputs = tuple(call.tensors().values())
    while True:
        tracer = Tracer(call, frozenset(float_modules), frozenset(specialize))
        try:
            with traceable_code(tracer, model), in_float32():
                graph = tracer.trace(model)
            cast_to_float32(graph)
        except Exception as error:
            path, reason = _blame(error, tracer, modules)
            if not path or path in float_modules or path in specialize:
                location = model_line(error) or line_of_forward(modules[path])
                nested = "nested" in code_at(location)
                raise TraceError(
                    f"the model's forward cannot be traced at {location or path or 'an unknown line'}: "
                    + (NESTED if nested else f"{reason}; {_ways_out(error, path)}"),
                    location=location,
                ) from error
            float_modules[path] = FloatModule(path, reason, model_line(error))
            continue
        refuse_transforms(graph)
        graph_module = graph_module_of(tracer.root, graph, type(model).__name__, plain)
        _drop_assertions(graph_module)
        _propagate_shapes(graph_module, inputs)
        closed = [
            path
            for path in float_modules
            if not _can_be_exported(graph_module, plain.get(path, path), inputs)
        ]
        if closed:
            specialize.update(closed)
            float_modules = {
                path: float_module
                for path, float_module in float_modules.items()
                if path not in closed
            }
            continue
        _refuse_closed_scripts(graph_module, inputs)
        settle_changed_constants(graph_module)
        _refuse_changes_seen_elsewhere(graph_module)
        whole = tuple(replace(m, path=plain.get(path, path)) for path, m in float_modules.items())
        return _compared(model, call, graph_module, whole, tracer)


def _compared(
    model: nn.Module,
    call: Call,
    graph_module: fx.GraphModule,
    whole: tuple[FloatModule, ...],
    tracer: Tracer,
) -> Traced:
    """The graph, held against its model, with what the tracer noted."""
    decisions = tuple(dict.fromkeys(tracer.decisions))
    try:
        any_batch = compare_on_two_batches(model, graph_module, call, other_values=not decisions)
    except TraceError as error:
        if not _opened(model, call, graph_module, tracer):
            raise
        try:
            any_batch = compare_on_two_batches(
                model, graph_module, call, other_values=not decisions
            )
        except TraceError:
            raise error from None
    return Traced(
        graph_module,
        call,
        whole,
        "symbolic",
        decisions,
        frozen=tuple(dict.fromkeys(tracer.frozen)),
        padded=tuple(dict.fromkeys(tracer.padded)),
        fixed_batch=not any_batch,
    )


def _opened(model: nn.Module, call: Call, graph_module: fx.GraphModule, tracer: Tracer) -> bool:
    """Whether the graph has numbers that the example's batch size made; they are written as that size."""
    larger = Tracer(more_samples(call), tracer.float_modules, tracer.specialize)
    try:
        with traceable_code(larger, model), in_float32():
            graph = larger.trace(model)
        cast_to_float32(graph)
    except Exception:
        return False
    again = graph_module_of(larger.root, graph, type(model).__name__, plain_paths(model))
    _drop_assertions(again)
    if not open_batch(graph_module, again, call):
        return False
    _propagate_shapes(graph_module, tuple(call.tensors().values()))
    return True


def _can_be_exported(graph_module: fx.GraphModule, path: str, inputs: Sequence[Any]) -> bool:
    """True where torch.export accepts the float module on what it receives from the example."""
    received: list[tuple[Any, ...]] = []

    class Watch(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target == path:
                received.append((args, kwargs))
            return super().call_module(target, args, kwargs)

    with torch.no_grad():
        Watch(graph_module).run(*inputs)
    try:
        with silent_export():
            for args, kwargs in received:
                torch.export.export(graph_module.get_submodule(path), args, kwargs)
    except Exception:
        return False
    return True


def _ways_out(error: Exception, path: str) -> str:
    if isinstance(error, LeavesTorch):
        return "compute that with torch's functions"
    if not isinstance(error, DependsOnData):
        return "move what cannot be traced into a submodule of its own"
    return (
        "move what depends on data into a submodule of its own, or take the branch of the example "
        f"with specialize = [{path!r}] in the recipe"
    )


def _propagate_shapes(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    try:
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            ShapeProp(graph_module).propagate(*(x.clone() for x in inputs))
    except Exception as error:
        raise TraceError(
            f"the traced graph does not run on the example inputs ({_inner(error)}): "
            "the model's Python code depends on more than its inputs; take that out of forward"
        ) from error


def _inner(error: Exception) -> str:
    """The reason of an error, without what shape propagation writes around it."""
    inside = str(error).startswith("ShapeProp error") and isinstance(error.__cause__, Exception)
    return first_line(error.__cause__ if inside else error)  # type: ignore[arg-type]


def _refuse_closed_scripts(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.find_nodes(op="call_module"):
        path = str(node.target)
        scripted = isinstance(modules[path], torch.jit.ScriptModule)
        if scripted and not _can_be_exported(graph_module, path, inputs):
            raise TraceError(
                f"the submodule {path!r} is TorchScript that torch.export cannot follow: use the "
                "Python module that it was made from",
                node=node.name,
                location=code_line(node),
            )


def _refuse_changes_seen_elsewhere(graph_module: fx.GraphModule) -> None:
    """The passes follow a changed tensor, not the other views of its memory: torch.export does."""
    node = change_seen_elsewhere(graph_module.graph, dict(graph_module.named_modules()))
    if node is not None:
        location = code_line(node)
        raise TraceError(
            f"{location or node.name} changes a view in place, and the change is read through "
            "another view: write it without changing in place",
            node=node.name,
            location=location,
        )


def _drop_assertions(graph_module: fx.GraphModule) -> None:
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "call_function" and node.target is torch._assert and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _blame(error: Exception, tracer: Tracer, modules: dict[str, nn.Module]) -> tuple[str, str]:
    path = tracer.path[-1] if tracer.path else ""
    strange = re.match(r"argument of type: <class '(.*)'>", str(error))
    reason = (
        f"an operation or a layer is given {with_article(strange[1].rpartition('.')[2])}, and a graph holds tensors, "
        "numbers and text only"
        if strange
        else first_line(error)
    )
    return (path if path in modules else ""), reason


def _float_module_share(traced: Traced, wanted: Sequence[str]) -> float:
    """Share of the parameters in float_modules that nobody asked for."""
    total = sum(p.numel() for p in traced.graph_module.parameters()) or 1
    inside = sum(
        p.numel()
        for float_module in traced.float_modules
        if float_module.path not in wanted
        for p in traced.graph_module.get_submodule(float_module.path).parameters()
    )
    return inside / total


def _export(model: nn.Module, call: Call, cause: TraceError | None) -> Traced:
    try:
        graph_module, call = export_graph(model, call)
    except TraceError as error:
        if cause is None:
            raise
        raise cause from error
    except Exception as error:
        reason = _inner(error)
        if "Constraints violated" in reason:
            sizes = "sizes" if any(call.free_axes) else "batch size"
            reason = f"it takes the example's {sizes} only"
        if cause is not None:
            sentence = f"{cause} (torch.export cannot trace it either: {reason})"
            raise TraceError(sentence, location=cause.location) from error
        raise TraceError(
            f"torch.export cannot trace the model ({reason}): wrap the part that depends on data in "
            "a submodule and use --set frontend=symbolic",
            location=model_line(error),
        ) from error
    return Traced(graph_module, call, (), "export")
