"""An exported model cut at every quantized activation, in sections that are run one after another.

The codes that a section reads come in from outside, under the tensor's name and `@given`; the codes that
it makes go out. So a rounding difference is seen where it is made and not again behind it, and only the
codes that a later section still reads are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

_GIVEN = "@given"


@dataclass(frozen=True)
class Section:
    """A model that makes `outputs` from the codes called `inputs`: codes, or in the last section the model's outputs.

    `floats` are inputs of the whole model that it reads. Its own inputs are named `given(name)`.
    """

    model: bytes
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    floats: tuple[str, ...]


def given(name: str) -> str:
    """What the codes of a tensor are called where a section reads them."""
    return f"{name}{_GIVEN}"


def _in_order(proto: onnx.ModelProto, codes: Collection[str]) -> list[str]:
    """Which of these quantized tensors the file has and annotates, in the order of its graph."""
    found = {a.tensor_name for a in proto.graph.quantization_annotation}.intersection(codes)
    return [name for node in proto.graph.node for name in node.output if name in found]


def cut(model: Path, sizes: Mapping[str, int], most: int) -> list[Section]:
    """Sections whose outputs have at most `most` codes in all, or are one tensor, and one of the model's outputs.

    `sizes` has the quantized tensors of the integer program, and how many codes each holds. External data
    stays where it is.
    """
    proto = onnx.load(str(model), load_external_data=False)
    names = _in_order(proto, sizes.keys())
    inside = set(names)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name in inside:
                node.input[index] = given(name)
    groups: list[list[str]] = []
    held = 0
    for name in names:
        size = sizes[name]
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    makers = {name: node for node in proto.graph.node for name in node.output}
    order = {id(node): index for index, node in enumerate(proto.graph.node)}
    ends = [value.name for value in proto.graph.output]
    return [_section(proto, group, names, makers, order) for group in (*groups, ends)]


def _section(
    proto: onnx.ModelProto,
    outputs: Sequence[str],
    names: Sequence[str],
    makers: Mapping[str, onnx.NodeProto],
    order: Mapping[int, int],
) -> Section:
    nodes: dict[int, onnx.NodeProto] = {}
    read: set[str] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        read.add(name)
        node = makers.get(name)
        if node is not None and order[id(node)] not in nodes:
            nodes[order[id(node)]] = node
            waiting.extend(name for name in node.input if name)
    inputs = tuple(name for name in names if given(name) in read)
    floats = [value for value in proto.graph.input if value.name in read]
    typed = {v.name: v for v in (*proto.graph.value_info, *proto.graph.output)}

    def described(name: str, called: str) -> onnx.ValueInfoProto:
        if name not in typed:
            return onnx.helper.make_tensor_value_info(called, onnx.TensorProto.UINT8, None)
        known = onnx.ValueInfoProto()
        known.CopyFrom(typed[name])
        known.name = called
        return known

    graph = onnx.helper.make_graph(
        [nodes[index] for index in sorted(nodes)],
        "section",
        [*floats, *(described(name, given(name)) for name in inputs)],
        [described(name, name) for name in outputs],
        [i for i in proto.graph.initializer if i.name in read],
    )
    made = onnx.helper.make_model(
        graph, opset_imports=proto.opset_import, ir_version=proto.ir_version
    )
    return Section(
        made.SerializeToString(), tuple(outputs), inputs, tuple(value.name for value in floats)
    )
