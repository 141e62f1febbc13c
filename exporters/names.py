"""Names of the values of an ONNX model: quantized tensors, and everything else inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from sqakd_fx.ir.quantized_tensors import QuantizedTensor
from sqakd_fx.ir.tensor_names import free_name

_TAG = "sqakd_fx.quantized_tensor"
"""The key of a value's own notes, which are not written to the file."""


def mark(value: ir.Value, tensor: QuantizedTensor) -> None:
    """Note what a value is, for the steps behind and in the file."""
    value.meta[_TAG] = tensor
    value.metadata_props.update(tensor.properties())


def is_marked(value: ir.Value) -> bool:
    """Whether a value is a quantized tensor of the integer program."""
    return _TAG in value.meta


def marked_tensor(value: ir.Value) -> QuantizedTensor | None:
    """What was noted of a quantized tensor."""
    tensor: QuantizedTensor | None = value.meta.get(_TAG)
    return tensor


def values_of(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of a model: inputs, stored tensors, and what its nodes make."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def names_of(model: ir.Model) -> set[str]:
    """The names that are taken in a model."""
    return {str(value.name) for value in values_of(model)}


def name_values(
    model: ir.Model,
    origins: Mapping[str, str],
    names: Mapping[str, str],
    tensors: Mapping[str, QuantizedTensor],
) -> None:
    """Quantized tensors are called as `names` has it, everything else after its node.

    `origins` has the lowered node of each value that an integer operation makes; `names` and `tensors` are by
    lowered node.
    """
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    wanted = set(names.values())
    quantized = {
        by_name[value]: origin
        for value, origin in origins.items()
        if value in by_name and origin in names
    }
    taken = names_of(model) | wanted
    for value in by_name.values():
        if value not in quantized and value.name in wanted:
            value.name = free_name(str(value.name), taken)
            taken.add(value.name)
    for value, origin in quantized.items():
        value.name = names[origin]
        mark(value, tensors[origin])
    _name_nodes(model)


def _name_nodes(model: ir.Model) -> None:
    outputs = set(model.graph.outputs)
    taken = names_of(model)
    counts: dict[str, int] = {}
    for node in model.graph:
        stem = _stem(node)
        counts[stem] = counts.get(stem, 0) + 1
        node.name = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
        for index, output in enumerate(node.outputs):
            numbered = (output.name or "").startswith("val_")  # by torch's exporter
            if numbered and not is_marked(output) and output not in outputs:
                output.name = free_name(f"{node.name}:{index}", taken)
                taken.add(output.name)


def _stem(node: ir.Node) -> str:
    """The path of the weight that a node reads, or of what it quantizes, and its operator."""
    for value in (*node.inputs[1:], *node.inputs[:1]):
        if value is None:
            continue
        producer = value.producer()
        name = (producer.name if producer is not None else value.name) or ""
        path = name.rpartition("/")[0] if producer is not None else name.rpartition(".")[0]
        if path and not path.startswith("constant"):
            return f"{path}/{node.op_type}"
    return node.op_type
