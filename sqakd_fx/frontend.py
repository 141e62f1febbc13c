"""From a user's model to a torch.fx graph, with shapes and the place each node came from.

`torch.fx.symbolic_trace` is tried first, because it keeps the user's module names. A submodule that
it cannot trace stays whole, as a float island. Where the model's own forward cannot be traced, or
where islands would hold most of the parameters, `torch.export` gives an aten-level graph instead.
"""

from __future__ import annotations

import inspect
import logging
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from sqakd_fx.attention import spell_out_attention
from sqakd_fx.compiler import largest_difference, tensors_of
from sqakd_fx.errors import TraceError
from sqakd_fx.tracer import Tracer, arguments_by_name, line_outside_torch, traceable_torch

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

    `decisions` are lines of the user's code that branch on data, where the example's branch was taken.
    """

    graph_module: fx.GraphModule
    islands: tuple[Island, ...]
    front_end: Literal["symbolic", "export"]
    decisions: tuple[str, ...] = ()


def trace(
    model: nn.Module,
    example_args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    front_end: FrontEnd = "auto",
) -> Traced:
    """Trace `model` (put in evaluation mode) and record every node's shape on the example.

    The graph takes the example's tensors positionally: arguments first, then keyword arguments in
    the order of the model's signature. Node metadata: `tensor_meta` and `module_path`.

    Raises:
        TraceError: neither front end can trace the model; names the line that stands in the way.
    """
    model = model.eval()
    example_kwargs = dict(example_kwargs or {})
    if front_end == "export":
        return _export(model, example_args, example_kwargs, None)
    try:
        traced = _symbolic(model, example_args, example_kwargs)
    except TraceError as error:
        if front_end == "symbolic":
            raise
        return _export(model, example_args, example_kwargs, error)
    share = _island_share(traced)
    if front_end == "auto" and share > 0.5:
        try:
            return _export(model, example_args, example_kwargs, None)
        except TraceError:
            return traced
    return traced


def flat_inputs(
    traced: Traced, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Arguments of one call in the order of the graph's placeholders."""
    names = [node.name for node in traced.graph_module.graph.nodes if node.op == "placeholder"]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    missing = [name for name in names if name not in given]
    if missing:
        raise TraceError(
            f"the model's input {missing[0]!r} is missing from this batch: give it in the data"
        )
    return tuple(given[name] for name in names)


def _symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """Trace with as few and as small islands as will do.

    An island that torch.export refuses could never be exported: it is traced after all, with the
    branches that the example takes.
    """
    spell_out_attention(model)
    islands: dict[str, Island] = {}
    decided: set[str] = set()
    constants = _constants(model, args, kwargs)
    example = arguments_by_name(model, args, kwargs)
    modules = dict(model.named_modules())
    while True:
        tracer = Tracer(example, frozenset(islands), frozenset(decided))
        try:
            with traceable_torch(tracer):
                graph = tracer.trace(model, constants or None)
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
        _drop_constant_inputs(graph_module, constants)
        inputs = _ordered(graph_module, args, kwargs)
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
        _compare_on_two_batches(model, graph_module, args, kwargs)
        decisions = tuple(dict.fromkeys(tracer.decisions))
        return Traced(graph_module, tuple(islands.values()), "symbolic", decisions)


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


def _compare_on_two_batches(
    model: nn.Module, graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise TraceError where the graph is another function than the model, or of one batch size only."""
    doubled_args, doubled_kwargs = torch.utils._pytree.tree_map(
        lambda x: torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.ndim else x, (args, kwargs)
    )
    with torch.no_grad():
        for some_args, some_kwargs in ((args, kwargs), (doubled_args, doubled_kwargs)):
            try:
                wanted = tensors_of(model(*some_args, **some_kwargs))
            except Exception:
                continue  # a model for one batch size
            try:
                got = tensors_of(graph_module(*_ordered(graph_module, some_args, some_kwargs)))
                difference = largest_difference(wanted, got)
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


def _constants(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of forward that the example leaves out or that are not tensors."""
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {}
    values: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = bound.arguments.get(name, parameter.default)
        if not any(isinstance(x, torch.Tensor) for x in torch.utils._pytree.tree_leaves(value)):
            values[name] = value
    return values


def _drop_constant_inputs(graph_module: fx.GraphModule, constants: dict[str, Any]) -> None:
    graph = graph_module.graph
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target is torch._assert and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        stem = str(node.target).lstrip("*")
        if not node.users and any(stem == n or stem.startswith(f"{n}_") for n in constants):
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    graph_module.recompile()


def _ordered(
    graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    names = [str(n.target) for n in graph_module.graph.nodes if n.op == "placeholder"]
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    given = dict(zip([n for n in names if n not in kwargs], tensors, strict=False)) | kwargs
    return [given[name] for name in names]


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


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cause: TraceError | None,
) -> Traced:
    dynamic = torch.export.Dim.DYNAMIC
    doubled_args, doubled_kwargs = torch.utils._pytree.tree_map(_two_samples, (args, kwargs))
    shapes = torch.utils._pytree.tree_map(
        lambda x: {0: dynamic} if isinstance(x, torch.Tensor) and x.ndim else None,
        (doubled_args, doubled_kwargs),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                model, doubled_args, doubled_kwargs, dynamic_shapes=_shapes(model, *shapes)
            )
        graph_module = program.module(check_guards=False)
        assert isinstance(graph_module, fx.GraphModule)
        _flatten_signature(graph_module)
        for node in graph_module.graph.nodes:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            node.meta["module_path"] = str(stack[-1][0]).removeprefix("L__self__.") if stack else ""
        propagate_shapes(graph_module, list(_leaves((doubled_args, doubled_kwargs))))
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
    return Traced(graph_module, (), "export")


def _shapes(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def _two_samples(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == 1:
        return torch.cat([x, x])
    return x


def _leaves(tree: Any) -> list[Any]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _flatten_signature(graph_module: fx.GraphModule) -> None:
    """Plain positional inputs, no guards, no constant inputs."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if (node.op == "call_module" and str(node.target).startswith("_guards")) or (
            node.op == "placeholder"
            and not node.users
            and not isinstance(node.meta.get("val"), torch.Tensor)
        ):
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    graph_module.recompile()
