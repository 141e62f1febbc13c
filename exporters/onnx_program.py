"""From the integer program to an ONNX model: export, name, annotate, serialize.

The float remainder of the graph goes through torch's own ONNX exporter; the integer ops go through
the translations of a profile (`container.py`, ...). Names of quantized tensors and weights are the
user's module paths, nothing depends on the machine, and the same program gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx

from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.interface import (
    UNDESCRIBED,
    Interface,
    describe_interface,
    name_interface,
)
from sqakd_fx.exporters.names import is_marked, name_values
from sqakd_fx.exporters.preprocessing import PREFIX
from sqakd_fx.exporters.runtime_rewrites import prevent_rewrites
from sqakd_fx.exporters.simplify import simplify
from sqakd_fx.exporters.translation import Form, Translator
from sqakd_fx.ir import meta
from sqakd_fx.ir.tensor_names import quantized_names
from sqakd_fx.storage import write_atomically

_EXTERNAL_DATA_BYTES = 1 << 31


def export_program(
    lowered: fx.GraphModule,
    example_inputs: Sequence[Any],
    form: Form,
    *,
    metadata: Mapping[str, str],
    interface: Interface = UNDESCRIBED,
    translator: Translator | None = None,
) -> ir.Model:
    """Translate a lowered graph to ONNX and name what is in it.

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
    model, origins = (translator or Translator()).translate(lowered, example_inputs, form)
    simplify(model, stored.keys())
    prevent_rewrites(model)
    name_values(model, origins, names, tensors)
    end = lowered.graph.output_node()
    name_interface(model, meta.output_names(end), form.free_axes)
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
            _annotate(proto, model)
            temporary.write_bytes(proto.SerializeToString(deterministic=True))

    write_atomically(path, write)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The ModelProto, with its quantization annotations."""
    proto = ir.serde.serialize_model(model)
    _annotate(proto, model)
    return proto


def _annotate(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Quantization annotations in, and types out that stored tensors and codes say themselves."""
    graph = proto.graph
    said = _said_elsewhere(graph)
    told = [v for v in graph.value_info if v.name not in said or v.metadata_props]
    del graph.quantization_annotation[:], graph.value_info[:]
    graph.value_info.extend(told)
    graph.quantization_annotation.extend(tensor_annotations(model))


def _said_elsewhere(graph: onnx.GraphProto) -> set[str]:
    """Stored tensors and what is computed from them alone, and floats that have the shape of codes beside them."""
    said = {tensor.name for tensor in graph.initializer}
    images = {x for node in graph.node if node.name.startswith(PREFIX) for x in node.output}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" or said.issuperset(filter(None, node.input)):
            said.update(node.output)
        elif node.op_type == "QuantizeLinear":
            said.add(node.input[0])
    return said - images


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


def tensor_annotations(model: ir.Model) -> list[onnx.TensorAnnotation]:
    """One quantization_annotation for every quantized tensor: what a quantizer gives, what is read."""
    found: dict[str, onnx.TensorAnnotation] = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            value: ir.Value | None = _bounded(node.outputs[0])
        elif node.op_type == "DequantizeLinear" or _reads_float_codes(node):
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


def _reads_float_codes(node: ir.Node) -> bool:
    """Whether a product gives codes that are floats their scale."""
    codes = node.inputs[0] if node.op_type == "Mul" else None
    return codes is not None and is_marked(codes) and codes.dtype == ir.DataType.FLOAT


def _bounded(codes: ir.Value) -> ir.Value:
    """Codes as the Clip that belongs to their quantizer leaves them."""
    users = list(codes.consumers())
    bounded = not is_marked(codes) and [user.op_type for user in users] == ["Clip"]
    return users[0].outputs[0] if bounded else codes
