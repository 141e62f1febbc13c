"""From the integer program to ONNX as torch's exporter writes it, translated once for all numbers.

Tracing and decomposing again is most of an export. A run translates its student before training and after it; the
graph is the same, so the second time the first translation is taken and its stored tensors are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, fx

from sqakd_fx.diagnostics.quiet import silent_export
from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.decompositions import decomposing_where_needed
from sqakd_fx.exporters.dynamic_shapes import dynamic_shapes
from sqakd_fx.exporters.kept_translations import kept_translations
from sqakd_fx.exporters.recurrent import RECURRENT, WholeLayers
from sqakd_fx.ir.copying import deep_copy
from sqakd_fx.ir.quantized_tensors import is_own_operation
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.recipe.free_axes import FreeAxes


@dataclass(frozen=True)
class Form:
    """How a program is to be translated: the translations of its own operations, and the target's rules.

    `batch_axis` of every input is dynamic, and its size fixed where it is None; so are the `free_axes` of each input.
    """

    translations: Mapping[Any, Callable[..., Any]]
    opset: int
    batch_axis: int | None = 0
    free_axes: FreeAxes = ()


_GLOBAL_POOLS = {
    torch.ops.aten.adaptive_avg_pool1d.default: 1,
    torch.ops.aten.adaptive_avg_pool2d.default: 2,
    torch.ops.aten.adaptive_avg_pool3d.default: 3,
}
"""Adaptive average pools and their number of spatial axes."""

Translated = tuple[ir.Model, dict[str, str]]
"""The ONNX model, and for its values made by integer ops the lowered node each came from."""


class Translator:
    """Translates integer programs; of the same graph as the last one only the numbers are made again."""

    def __init__(self) -> None:
        self._key: Any = None
        self._kept: Translated | None = None

    def translate(
        self, lowered: fx.GraphModule, example_inputs: Sequence[Any], form: Form
    ) -> Translated:
        """A model of its own, which the caller may change.

        Raises:
            ExportError: torch's exporter refuses an operation; the message names it.
        """
        stored = dict(_stored_tensors(lowered))
        key = _what_is_translated(lowered, stored, example_inputs, form)
        if self._kept is None or key != self._key:
            model, origins = _translate(lowered, example_inputs, form)
            if not _is_told_apart(model, stored):
                return model, origins
            self._key, self._kept = key, (model, origins)
        model, origins = self._kept
        model = model.clone()  # also the first time: what is added to a copy gets other names
        _refresh(model, stored)
        return model, origins


def _stored_tensors(lowered: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """What the graph reads by name, and what the modules that it calls hold."""
    for node in lowered.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            value = constant_of(lowered, node)
            if value is not None:
                yield target, value
        elif node.op == "call_module":
            module = lowered.get_submodule(target)
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                yield f"{target}.{name}", tensor


def _what_is_translated(
    lowered: fx.GraphModule, stored: Mapping[str, Tensor], example: Sequence[Any], form: Form
) -> Any:
    """All that a translation depends on, which is all but the numbers in stored tensors."""
    nodes = [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in lowered.graph.nodes]
    first: dict[int, str] = {}
    shared = {name: first.setdefault(id(tensor), name) for name, tensor in stored.items()}
    kinds = {name: _kind(tensor) for name, tensor in stored.items()}
    return nodes, shared, kinds, [_kind(x) for x in example], form


def _kind(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x


def _is_told_apart(model: ir.Model, stored: Mapping[str, Tensor]) -> bool:
    """Whether each initializer is the stored tensor of its name: then no number is anywhere else."""
    for name, value in model.graph.initializers.items():
        if name not in stored or value.const_value is None:
            return False
        wanted = TorchTensor(stored[name].detach())
        if (value.const_value.dtype, value.const_value.shape) != (wanted.dtype, wanted.shape):
            return False
    return True


def _refresh(model: ir.Model, stored: Mapping[str, Tensor]) -> None:
    for name, value in model.graph.initializers.items():
        value.const_value = TorchTensor(stored[str(name)].detach(), name=name)


def _translate(lowered: fx.GraphModule, example_inputs: Sequence[Any], form: Form) -> Translated:
    lowered = _with_tensors_only(lowered, example_inputs)
    shapes = dynamic_shapes(example_inputs, form.batch_axis, form.free_axes)
    program: torch.export.ExportedProgram | None = None
    with silent_export(), kept_translations():
        try:
            with WholeLayers():
                program = torch.export.export(
                    lowered,
                    tuple(example_inputs),
                    dynamic_shapes=(shapes,) if _takes_varargs(lowered) else shapes,
                )
            _pools_as_means(program.graph)
            exported = torch.onnx.export(
                decomposing_where_needed(program),
                dynamo=True,
                opset_version=form.opset,
                custom_translation_table={**RECURRENT, **form.translations},
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            reason = _reason(error, lowered, program, any(form.free_axes))
            raise ExportError(f"the student cannot be written as ONNX: {reason}") from error
    assert exported is not None
    assert exported.exported_program is not None
    origins = {
        node.name: _origin(node)
        for node in exported.exported_program.graph.nodes
        if is_own_operation(node)
    }
    InlinePass()(exported.model)  # torch 2.8 leaves some operations as functions
    return exported.model, origins


def _pools_as_means(graph: fx.Graph) -> None:
    """A mean for each global average pool: torch 2.8 takes one apart into a mean and an as_strided."""
    for node in list(graph.nodes):
        axes = _GLOBAL_POOLS.get(node.target, 0)
        if axes and all(size == 1 for size in node.args[1]):
            dims = [-1 - axis for axis in range(axes)]
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], dims, True)


def _with_tensors_only(lowered: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph without outputs that are None or plain numbers: ONNX has no such outputs."""
    if all(isinstance(leaf, fx.Node) and _makes_tensors(leaf) for leaf in _outputs(lowered)):
        return lowered
    lowered = deep_copy(lowered)
    running = fx.Interpreter(lowered, garbage_collect_values=False)
    with torch.no_grad():
        running.run(*example_inputs)
    end = lowered.graph.output_node()
    kept = [leaf for leaf in _outputs(lowered) if isinstance(leaf, fx.Node)]
    end.args = (tuple(leaf for leaf in kept if isinstance(running.env[leaf], torch.Tensor)),)
    lowered.recompile()
    return lowered


def _outputs(graph_module: fx.GraphModule) -> list[Any]:
    """What a graph returns, in order, dataclasses taken apart."""
    end = graph_module.graph.output_node()
    found: list[Any] = []
    pending = list(torch.utils._pytree.tree_leaves(end.args[0]))
    while pending:
        leaf = pending.pop(0)
        if isinstance(leaf, fx.Node) and isinstance(leaf.target, type):
            pending = [*torch.utils._pytree.tree_leaves((leaf.args, leaf.kwargs)), *pending]
        else:
            found.append(leaf)
    return found


def _makes_tensors(node: fx.Node) -> bool:
    return "tensor_meta" in node.meta or is_own_operation(node)


def _origin(node: fx.Node) -> str:
    """The name of the lowered node, through the graphs that torch.export made on the way."""
    source: Any = next(iter(node.meta.get("from_node") or ()), None)
    name = node.name
    while source is not None:
        name = source.name
        source = next(iter(source.from_node), None)
    return name


def _takes_varargs(graph_module: fx.GraphModule) -> bool:
    return any(
        str(n.target).startswith("*") for n in graph_module.graph.find_nodes(op="placeholder")
    )


def _reason(
    error: Exception,
    lowered: fx.GraphModule,
    program: torch.export.ExportedProgram | None,
    has_free_axes: bool,
) -> str:
    text = str(error)
    if "Constraints violated" in text and has_free_axes:
        told = re.findall(r"marked (L\[[^\n]*)", text)
        said = f" (torch.export: {told[0].rstrip('. ')[:160]})" if told else ""
        return (
            "the model's operations hold for the example's sizes only, and the recipe frees some (dynamic): leave out "
            f"the axis that is fixed{said}"
        )
    if "Constraints violated" in text:
        return (
            "it works for the example's size of axis 0 only, which must be the batch axis of every "
            "input; give example_inputs() with a batch axis, and write no batch size into the model"
        )
    failed = re.search(r"translating node %(\w+)[^\n]*?target=([\w.]+)", text)
    if failed:
        line = _line_of(failed[1], lowered, program)
        what = f"{failed[2].removeprefix('torch.ops.')}{f' ({line})' if line else ''}"
        if _is_complex(failed[1], program):
            return (
                f"{what} has no ONNX form for complex numbers; write it on torch.view_as_real(...)"
            )
        return f"{what} has no ONNX form with these arguments; write it in other operations"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and re.fullmatch(r"\w+\.\w+\.\w+", lines[0].rstrip(".")):
        return f"{lines[0].rstrip('.')} has no ONNX form; write it in other operations"
    telling = [line for line in lines if "No ONNX function" in line]
    return (telling or lines or [type(error).__name__])[0].rstrip(".")[:300]


def _is_complex(name: str, program: torch.export.ExportedProgram | None) -> bool:
    made = next((n for n in program.graph.nodes if n.name == name), None) if program else None
    value = made.meta.get("val") if made is not None else None
    return isinstance(value, Tensor) and value.is_complex()


def _line_of(
    name: str, lowered: fx.GraphModule, program: torch.export.ExportedProgram | None
) -> str | None:
    """The user's line behind a node that torch's exporter names, also where it took an operation apart."""
    nodes = {node.name: node for node in lowered.graph.nodes}
    if name not in nodes and program is not None:
        parts = program.run_decompositions().graph.nodes
        name = next((_origin(node) for node in parts if node.name == name), name)
    return code_line(nodes[name]) if name in nodes else None
