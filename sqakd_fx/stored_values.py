"""Hold the numbers in an exported file against the integer program: scales, zero points, codes, biases.

A scale that is off by one part in 10,000 changes few codes of any batch; here it is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx

import sqakd_fx.integer_ops  # noqa: F401  (registers torch.ops.sqakd_fx)
from sqakd_fx.graphs import get_attribute

_OPS = torch.ops.sqakd_fx
Array = np.ndarray[Any, Any]


def file_names(lowered: fx.GraphModule) -> dict[str, str]:
    """Lowered node name to the name of its quantized tensor in the ONNX file."""
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    for node in lowered.graph.nodes:
        tag = node.meta.get("quantized_tensor")
        if tag is None or str(getattr(node.target, "namespace", "")) != "sqakd_fx":
            continue
        stem = f"{tag['name']}_quantized"
        counts[stem] = counts.get(stem, 0) + 1
        found[node.name] = stem if counts[stem] == 1 else f"{stem}_{counts[stem] - 1}"
    return found


def differing_values(lowered: fx.GraphModule, model: Path) -> list[str]:
    """A sentence for each quantized tensor, weight or bias whose stored numbers differ."""
    proto = onnx.load(str(model))
    constants = _constants(proto)
    around = _operators_around(proto)
    names = file_names(lowered)
    wrong: list[str] = []

    def value_of(node: fx.Node, argument: str) -> torch.Tensor | None:
        arguments = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        source = node.args[arguments.index(argument)] if argument in arguments else None
        return (
            None if not isinstance(source, fx.Node) else get_attribute(lowered, str(source.target))
        )

    for node in lowered.graph.nodes:
        if node.name in names:
            tensor = names[node.name]
            for index, argument in ((1, "scale"), (2, "zero_point")):
                wanted = value_of(node, argument)
                assert wanted is not None
                for operator in around.get(tensor, ()):
                    if not _equal(constants.get(operator.input[index]), wanted):
                        what = argument.replace("_", " ")
                        wrong.append(
                            f"{tensor}: the {what} in its {operator.op_type} is not what was trained"
                        )
        elif node.target in (_OPS.conv.default, _OPS.linear.default):
            wrong += _differing_layer(node, value_of, constants)
    return list(dict.fromkeys(wrong))


def _differing_layer(
    node: fx.Node,
    value_of: Callable[[fx.Node, str], torch.Tensor | None],
    constants: Mapping[str, Array],
) -> list[str]:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    stored = {n: str(a.target) for n, a in zip(names, node.args) if isinstance(a, fx.Node)}
    weight, scale = stored["weight"], stored["weight_scale"]
    wrong = []
    codes, step = value_of(node, "weight"), value_of(node, "weight_scale")
    assert codes is not None
    assert step is not None
    if weight not in constants or scale not in constants:
        wrong.append(f"{weight}: its codes or its scale are missing")
    elif not np.array_equal(
        _decoded(constants[weight], constants[scale]), _decoded(codes.numpy(), step.numpy())
    ):
        wrong.append(f"{weight}: its codes and scale are not what was trained")
    for argument in ("bias", "accumulator_scale"):
        wanted = value_of(node, argument)
        if (
            wanted is not None
            and "bias" in stored
            and not _equal(constants.get(stored[argument]), wanted)
        ):
            wrong.append(f"{stored[argument]}: the stored values are not what was trained")
    return wrong


def _decoded(codes: Array, scale: Array) -> Array:
    wide = scale.reshape(-1, *[1] * (codes.ndim - 1)) if scale.ndim else scale
    return codes.astype(np.float32) * wide


def _equal(found: Array | None, wanted: torch.Tensor) -> bool:
    expected = wanted.detach().cpu().numpy().reshape(-1)
    return found is not None and np.array_equal(found.reshape(-1), expected)


def _operators_around(proto: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """The QuantizeLinear that makes each coded tensor, and every DequantizeLinear that reads it."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            found.setdefault(node.output[0], []).append(node)
        elif node.op_type == "DequantizeLinear":
            found.setdefault(node.input[0], []).append(node)
        elif node.op_type == "Clip":
            maker = makers.get(node.input[0])
            if maker is not None and maker.op_type == "QuantizeLinear":
                found.setdefault(node.output[0], []).append(maker)
    return found


def _constants(proto: onnx.ModelProto) -> dict[str, Array]:
    """Initializers by name; packed weights as the codes that their Cast, Mul and Add make of them."""
    found = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    made_from: dict[str, str] = {}
    values: dict[str, Array] = {}
    for node in proto.graph.node:
        known = [values.get(name, found.get(name)) for name in node.input]
        if node.op_type not in ("Cast", "Mul", "Add") or any(k is None for k in known):
            continue
        value = known[0]
        assert value is not None
        if value.dtype == np.float32:  # the scale of a bias
            if node.op_type == "Mul":
                found[node.output[0]] = value * known[1]
            continue
        value = value.astype(np.int32)
        if node.op_type == "Mul":
            value = value * found[node.input[1]]
        elif node.op_type == "Add":
            value = value + found[node.input[1]]
        values[node.output[0]] = value
        made_from[node.output[0]] = made_from.get(node.input[0], node.input[0])
    for output, origin in made_from.items():
        found[origin] = values[output]
    return found
