"""The second front end: `torch.export`, for what symbolic tracing cannot follow."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from sqakd_fx.diagnostics.quiet import silent_export
from sqakd_fx.errors import TraceError
from sqakd_fx.frontend.example_call import Call, two_samples
from sqakd_fx.frontend.verify import compare_on_two_batches
from sqakd_fx.ir import meta
from sqakd_fx.ir.aliasing import change_seen_elsewhere
from sqakd_fx.ir.batches import samples_in
from sqakd_fx.recipe.free_axes import of_each


def export_graph(model: nn.Module, call: Call) -> tuple[fx.GraphModule, Call]:
    """The model as an aten-level graph over the tensors of a call with at least two samples.

    A graph that changes views in place is made functional. Raises whatever torch.export raises, and
    TraceError where the graph is not the model.
    """
    call = two_samples(call)
    tensors = {name: x.clone() for name, x in call.tensors().items()}  # export guards a view's base
    batch = samples_in(tensors.values(), 0)
    free = of_each(call.free_axes, len(tensors))
    shapes = tuple(
        dict.fromkeys(
            [*([0] if x.ndim and len(x) == batch else []), *axes], torch.export.Dim.DYNAMIC
        )
        or None
        for x, axes in zip(tensors.values(), free, strict=True)
    )
    with silent_export():
        program = torch.export.export(
            _Flat(model, call), tuple(tensors.values()), dynamic_shapes=(shapes,)
        )
        graph_module = _module_of(program)
        if change_seen_elsewhere(graph_module.graph, dict(graph_module.named_modules())):
            graph_module = _module_of(program.run_decompositions({}))
        _tidy(graph_module, list(tensors))
        graph_module = fx.GraphModule(graph_module, graph_module.graph, type(model).__name__)
        graph_module.eval()  # a decomposed program's module is in training mode
        with torch.no_grad():
            ShapeProp(graph_module).propagate(*tensors.values())
        if not compare_on_two_batches(model, graph_module, call, other_values=True):
            raise TraceError(
                "the model takes the example's batch size only, or puts the samples of another together: "
                "leave --set frontend=export out"
            )
    return graph_module, call


def _module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    guarded = "check_guards" in inspect.signature(program.module).parameters  # from torch 2.9 on
    graph_module = program.module(check_guards=False) if guarded else program.module()
    assert isinstance(graph_module, fx.GraphModule)
    return graph_module


class _Flat(nn.Module):
    """The model as a function of its named tensors, by position."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *tensors: Any) -> Any:
        args, kwargs = self.call.with_tensors(dict(zip(self.call.tensors(), tensors, strict=True)))
        return self.model(*args, **kwargs)


def _tidy(graph_module: fx.GraphModule, names: Sequence[str]) -> None:
    """Positional inputs of the call's names, module paths of the user's model, and no guards."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        meta.set_module_path(
            node, path.removeprefix("L__self__.").removeprefix("model").lstrip(".")
        )
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
