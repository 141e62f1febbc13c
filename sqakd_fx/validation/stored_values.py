"""Hold the numbers in an exported file against the integer program: scales, zero points, codes, biases.

A scale that is off by one part in 10,000 changes few codes of any batch; here it is seen at once.
"""

from __future__ import annotations

from collections.abc import Collection, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import fx

import sqakd_fx.ir.integer_ops  # noqa: F401  (registers torch.ops.sqakd_fx)
from sqakd_fx.ir.quantized_tensors import is_own_operation
from sqakd_fx.ir.rewriting import get_attribute
from sqakd_fx.ir.tensor_names import quantized_names
from sqakd_fx.validation.code_shifts import code_shifts
from sqakd_fx.validation.file_constants import Array, FileConstants

_OPS = torch.ops.sqakd_fx


class Stored(NamedTuple):
    """Codes of a weight or a bias and the scale that one layer reads them with; layers may share codes alone."""

    codes: torch.Tensor
    scale: torch.Tensor

    def equals(self, codes: Array, scale: Array) -> bool:
        """Whether both stand for the same numbers, up to signs that a channel's codes may have taken."""
        own = self.scale.numpy()
        same = np.array_equal(_decoded(codes, scale), _decoded(self.codes.numpy(), own))
        return same and bool((np.abs(scale) == np.abs(own)).all())


def differing_values(lowered: fx.GraphModule, model: Path) -> list[str]:
    """A sentence for each quantized tensor, weight or bias whose stored numbers differ."""
    proto = onnx.load(str(model), load_external_data=False)
    constants = FileConstants(proto, model.parent)
    readers = _readers(proto, constants)
    names = quantized_names(lowered)
    shifts = code_shifts(lowered, names, model)
    around = _operators_around(proto, set(names.values()))
    wrong: list[str] = []
    trained: dict[str, dict[str, Stored]] = {}
    for node in lowered.graph.nodes:
        values = _arguments(lowered, node)
        if node.name in names:
            tensor = names[node.name]
            for index, argument in ((1, "scale"), (2, "zero_point")):
                made = values[argument]
                if tensor in shifts and argument == "zero_point":
                    made = torch.zeros(())
                read = _scales_of_readers(lowered, node) if argument == "scale" else []
                for operator in around.get(tensor, ()):
                    reads = operator.op_type == "DequantizeLinear"
                    wanted = (read if reads else []) or [made]
                    found = _parameter(constants, operator, index)
                    if not any(_equal(found, one) for one in wanted):
                        what = argument.replace("_", " ")
                        wrong.append(
                            f"{tensor}: the {what} in its {operator.op_type} is not what was trained"
                        )
        elif node.target in (_OPS.conv.default, _OPS.linear.default):
            for codes, scale in (("weight", "weight_scale"), ("bias", "accumulator_scale")):
                if codes in values:
                    name, step = (str(_argument(node, a).target) for a in (codes, scale))
                    trained.setdefault(name, {})[step] = Stored(values[codes], values[scale])
        elif node.target is _OPS.dequantize_weight.default and not _has_product(
            proto, constants, values["weight"], values["weight_scale"]
        ):
            name = str(_argument(node, "weight").target)
            wrong.append(f"{name}: this weight's codes and scales are not what was trained")
        elif node.target is _OPS.look_up.default and not _has_table(
            proto, constants, values["codes"], values["scale"]
        ):
            name = str(_argument(node, "codes").target)
            wrong.append(f"{name}: this table's codes and scales are not what was trained")
    for name, by_scale in trained.items():
        wrong += _differing(constants, readers.get(name, ()), name, by_scale.values())
    return list(dict.fromkeys(wrong))


def _arguments(lowered: fx.GraphModule, node: fx.Node) -> dict[str, torch.Tensor]:
    """The stored tensors that an integer operation reads, by argument."""
    if not is_own_operation(node):
        return {}
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {
        name: get_attribute(lowered, str(value.target))
        for name, value in zip(names, node.args)
        if isinstance(value, fx.Node) and value.op == "get_attr"
    }


def _scales_of_readers(lowered: fx.GraphModule, node: fx.Node) -> list[torch.Tensor]:
    """The scales with which integer operations read a tensor: the argument behind its codes."""
    return [
        get_attribute(lowered, str(user.args[place + 1].target))  # type: ignore[union-attr]
        for user in filter(is_own_operation, node.users)
        for place, given in enumerate(user.args[:-1])
        if given is node and getattr(user.args[place + 1], "op", None) == "get_attr"
    ]


def _argument(node: fx.Node, name: str) -> Any:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return node.args[names.index(name)]


def _decoded(codes: Array, scale: Array) -> Array:
    wide = scale.reshape(-1, *[1] * (codes.ndim - 1)) if scale.ndim else scale
    return codes.astype(np.float32) * wide


def _parameter(constants: FileConstants, operator: onnx.NodeProto, index: int) -> Array | None:
    """The stored scale or zero point of a quantizer; a zero point that it has not is 0."""
    return constants.value(operator.input[index]) if index < len(operator.input) else np.zeros(1)


def _equal(found: Array | None, wanted: torch.Tensor) -> bool:
    expected = wanted.detach().cpu().numpy().reshape(-1)
    return found is not None and np.array_equal(found.reshape(-1), expected)


def _operators_around(proto: onnx.ModelProto, tensors: Set[str]) -> dict[str, list[onnx.NodeProto]]:
    """The QuantizeLinear that makes each coded tensor, and every DequantizeLinear that reads it.

    Codes are followed through what moves or clips them.
    """
    makers = {name: node for node in proto.graph.node for name in node.output}
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            name = node.input[0]
            while (
                name in makers and name not in tensors and makers[name].op_type != "QuantizeLinear"
            ):
                name = makers[name].input[0]
            found.setdefault(name, []).append(node)
    for name in tensors & makers.keys():
        maker = makers[name]
        if maker.op_type == "Clip":
            maker = makers.get(maker.input[0], maker)
        if maker.op_type == "QuantizeLinear":
            found.setdefault(name, []).append(maker)
    return found


def _readers(proto: onnx.ModelProto, constants: FileConstants) -> dict[str, list[onnx.NodeProto]]:
    """The DequantizeLinear nodes behind each stored tensor."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            found.setdefault(constants.origin(node.input[0]), []).append(node)
    return found


def _has_table(
    proto: onnx.ModelProto, constants: FileConstants, codes: torch.Tensor, scale: torch.Tensor
) -> bool:
    """Whether the same indices gather these codes and these scales of rows."""
    gathers = [node for node in proto.graph.node if node.op_type == "Gather"]
    tables = {n.input[1] for n in gathers if _equal(constants.value(n.input[0]), codes)}
    return any(n.input[1] in tables and _equal(constants.value(n.input[0]), scale) for n in gathers)


def _has_product(
    proto: onnx.ModelProto, constants: FileConstants, codes: torch.Tensor, scale: torch.Tensor
) -> bool:
    """Whether these codes are multiplied by these scales."""
    return any(
        _equal(constants.value(n.input[0]), codes) and _equal(constants.value(n.input[1]), scale)
        for n in proto.graph.node
        if n.op_type == "Mul"
    )


def _of_channels(constants: FileConstants, reader: onnx.NodeProto) -> Array | None:
    """The scales of a DequantizeLinear; of blocks those of channels, where the blocks of each have the same."""
    scale = constants.value(reader.input[1])
    if scale is None or scale.ndim != 2:
        return scale
    axis = next(int(a.i) for a in reader.attribute if a.name == "axis")
    first = scale.take([0], axis)
    return first.reshape(-1) if bool((scale == first).all()) else None


def _differing(
    constants: FileConstants,
    readers: Collection[onnx.NodeProto],
    name: str,
    trained: Collection[Stored],
) -> list[str]:
    """What is wrong with the codes called `name` and with the scales that layers read them with."""
    as_float = constants.value(f"{name}_float")
    if as_float is not None:
        same = any(np.array_equal(as_float, _decoded(*(x.numpy() for x in one))) for one in trained)
        return [] if same else [f"{name}: its values are not what was trained"]
    if name not in constants.stored or not readers:
        return [f"{name}: no DequantizeLinear reads it from the file"]
    wrong, missing = [], list(trained)
    for reader in readers:
        found, step = constants.value(reader.input[0]), _of_channels(constants, reader)
        zero = constants.value(reader.input[2]) if len(reader.input) > 2 else None
        if zero is not None and zero.any():
            wrong.append(f"{name}: its zero point is not 0")
        elif found is None or step is None:
            wrong.append(f"{name}: its codes or its scale are computed, not stored")
        elif not any(one.equals(found, step) for one in trained):
            wrong.append(f"{name}: its codes and scale are not what was trained")
        else:
            missing = [one for one in missing if not one.equals(found, step)]
    return wrong or [f"{name}: its codes and scale are not what was trained"] * bool(missing)
