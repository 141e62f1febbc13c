"""From the integer program to an ONNX model: export, name, annotate, serialize.

The float remainder of the graph goes through torch's own ONNX exporter; the integer ops go through
the translations of a profile (`container.py`, ...). Names of quantized tensors and weights are the
user's module paths, nothing depends on the machine, and the same program gives the same bytes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx

from sqakd_fx.diagnostics.quiet import silent_export
from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.interface import (
    UNDESCRIBED,
    Interface,
    describe_interface,
    name_interface,
)
from sqakd_fx.exporters.kept_translations import kept_translations
from sqakd_fx.exporters.names import is_marked, name_values
from sqakd_fx.exporters.runtime_rewrites import prevent_rewrites
from sqakd_fx.exporters.simplify import simplify
from sqakd_fx.ir import meta
from sqakd_fx.ir.quantized_tensors import is_own_operation
from sqakd_fx.ir.tensor_names import quantized_names
from sqakd_fx.storage import write_atomically

_EXTERNAL_DATA_BYTES = 1 << 31


def export_program(
    lowered: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    translations: Mapping[Any, Callable[..., Any]],
    opset: int,
    metadata: Mapping[str, str],
    interface: Interface = UNDESCRIBED,
    batch_axis: int | None = 0,
) -> ir.Model:
    """Translate a lowered graph to ONNX; `batch_axis` of every input is dynamic, and all sizes fixed where it is None.

    Outputs have the names that the front end gave them (`meta.output_names`).

    Raises:
        ExportError: torch's exporter refuses an operation; the message names it.
    """
    lowered.graph.eliminate_dead_code()
    lowered.recompile()
    example_inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in example_inputs]
    tensors = {
        node.name: tensor
        for node in lowered.graph.nodes
        if (tensor := meta.quantized_tensor(node)) is not None
    }
    names = quantized_names(lowered)
    stored = {
        str(node.target): tensors[node.name]
        for node in lowered.graph.find_nodes(op="get_attr")
        if node.name in tensors
    }
    model, origins = _translate(lowered, example_inputs, translations, opset, batch_axis)
    simplify(model, stored.keys())
    prevent_rewrites(model)
    name_values(model, origins, names, tensors)
    end = lowered.graph.output_node()
    name_interface(model, meta.output_names(end))
    describe_interface(model, interface)
    for name, tensor in stored.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].metadata_props.update(tensor.properties())
    model.producer_name = "sqakd-fx"
    model.producer_version = metadata.get("sqakd_fx.version")
    model.graph.name = "student"
    model.metadata_props.update({key: metadata[key] for key in sorted(metadata)})
    return model


def save_model(model: ir.Model, path: Path) -> None:
    """Write an ONNX file atomically; weights above 2 GB go to a file beside it."""
    stored = (value.const_value for value in model.graph.initializers.values())
    size = sum(t.nbytes for t in stored if t is not None and t.dtype != ir.DataType.STRING)

    def write(temporary: Path) -> None:
        if size < _EXTERNAL_DATA_BYTES:
            temporary.write_bytes(to_proto(model).SerializeToString(deterministic=True))
        else:
            ir.save(model, temporary, external_data=f"{path.name}.data")
            proto = onnx.load(str(temporary), load_external_data=False)
            proto.graph.quantization_annotation.extend(tensor_annotations(model))
            temporary.write_bytes(proto.SerializeToString(deterministic=True))

    write_atomically(path, write)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The ModelProto, with its quantization annotations."""
    proto = ir.serde.serialize_model(model)
    del proto.graph.quantization_annotation[:]
    proto.graph.quantization_annotation.extend(tensor_annotations(model))
    return proto


def check_model(path: Path) -> None:
    """onnx.checker in full, with shape inference; raises ExportError."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ExportError(
            f"what would be written is not valid ONNX ({first.rstrip('.')}): write the part that this names in other "
            "operations, and report the model"
        ) from error


def _translate(
    lowered: fx.GraphModule,
    example_inputs: Sequence[Any],
    translations: Mapping[Any, Callable[..., Any]],
    opset: int,
    batch_axis: int | None,
) -> tuple[ir.Model, dict[str, str]]:
    """The ONNX model, and for its values made by integer ops the lowered node each came from."""
    lowered = _with_tensors_only(lowered, example_inputs)
    dynamic = {} if batch_axis is None else {batch_axis: torch.export.Dim.DYNAMIC}
    shapes = tuple(
        dynamic if isinstance(x, torch.Tensor) and x.ndim else None for x in example_inputs
    )
    program: torch.export.ExportedProgram | None = None
    with silent_export(), kept_translations():
        try:
            program = torch.export.export(
                lowered,
                tuple(example_inputs),
                dynamic_shapes=(shapes,) if _takes_varargs(lowered) else shapes,
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=dict(translations),
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(
                f"the student cannot be written as ONNX: {_reason(error, lowered, program)}"
            ) from error
    assert exported is not None
    assert exported.exported_program is not None
    origins = {
        node.name: _origin(node)
        for node in exported.exported_program.graph.nodes
        if is_own_operation(node)
    }
    return exported.model, origins


def _with_tensors_only(lowered: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph without outputs that are None or plain numbers: ONNX has no such outputs."""
    if all(isinstance(leaf, fx.Node) and _makes_tensors(leaf) for leaf in _outputs(lowered)):
        return lowered
    lowered = copy.deepcopy(lowered)
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
    error: Exception, lowered: fx.GraphModule, program: torch.export.ExportedProgram | None
) -> str:
    text = str(error)
    if "Constraints violated" in text:
        return (
            "it works for the example's size of axis 0 only, which must be the batch axis of every "
            "input; give example_inputs() with a batch axis, and write no batch size into the model"
        )
    failed = re.search(r"translating node %(\w+)[^\n]*?target=([\w.]+)", text)
    if failed:
        line = _line_of(failed[1], lowered, program)
        return (
            f"{failed[2].removeprefix('torch.ops.')}{f' ({line})' if line else ''} has no ONNX form "
            "with these arguments; write it in other operations"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "No ONNX function" in line]
    return (telling or lines or [type(error).__name__])[0].rstrip(".")[:300]


def _line_of(
    name: str, lowered: fx.GraphModule, program: torch.export.ExportedProgram | None
) -> str | None:
    """The user's line behind a node that torch's exporter names, also where it took an operation apart."""
    nodes = {node.name: node for node in lowered.graph.nodes}
    if name not in nodes and program is not None:
        parts = program.run_decompositions().graph.nodes
        name = next((_origin(node) for node in parts if node.name == name), name)
    return code_line(nodes[name]) if name in nodes else None


def tensor_annotations(model: ir.Model) -> list[onnx.TensorAnnotation]:
    """One quantization_annotation for every quantized tensor: what a quantizer gives, what is read."""
    found: dict[str, onnx.TensorAnnotation] = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            value: ir.Value | None = _bounded(node.outputs[0])
        elif node.op_type == "DequantizeLinear":
            value = node.inputs[0]
        else:
            continue
        scale = node.inputs[1]
        assert value is not None
        assert scale is not None
        if value.name in found:
            continue
        note = onnx.TensorAnnotation(tensor_name=value.name)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=scale.name)
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        if zero_point is not None:
            note.quant_parameter_tensor_names.add(key="ZERO_POINT_TENSOR", value=zero_point.name)
        found[str(value.name)] = note
    return list(found.values())


def _bounded(codes: ir.Value) -> ir.Value:
    """Codes as the Clip that belongs to their quantizer leaves them."""
    users = list(codes.consumers())
    bounded = not is_marked(codes) and [user.op_type for user in users] == ["Clip"]
    return users[0].outputs[0] if bounded else codes
