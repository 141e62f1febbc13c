"""What a runtime's documentation says of the files that it takes, as rules that a file keeps or breaks.

TensorRT (Explicit Quantization, and the operators Quantize and Dequantize in its documentation; the assertions of its
ONNX parser): symmetric INT8, or INT4 for weights in blocks; scales that are constants, a zero point that is 0; one
scale for an activation, one for each output channel of a weight; a QuantizeLinear is read by a DequantizeLinear, and a
layer is fused with those in front of all its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.tensorrt import QUANTIZED_LAYERS
from sqakd_fx.targets import TARGETS
from sqakd_fx.validation.file_constants import FileConstants

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_WITH_WEIGHT = {"Conv": 0, "Gemm": 0, "ConvTranspose": 1}
"""The axis of a weight's output channels; of a Gemm, whose weight is transposed."""

_BLOCKS = (64, 128)

_MOVES: tuple[str, ...] = (
    "Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip


class TargetFile:
    """An ONNX file, as rules look at it."""

    def __init__(self, path: Path) -> None:
        proto = onnx.load(str(path), load_external_data=False)
        self.nodes = list(proto.graph.node)
        self.stored = {i.name: i for i in proto.graph.initializer}
        self.constants = FileConstants(proto, path.parent)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.has_free_sizes = any(
            size.dim_param for v in proto.graph.input for size in v.type.tensor_type.shape.dim
        )
        self.outputs = {value.name for value in proto.graph.output}
        said = next((p.value for p in proto.metadata_props if p.key == TARGET_KEY), "")
        self.target: str = said if said in TARGETS else "onnxruntime"

    def quantizers(self) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type in _QUANTIZERS)

    def type_of_codes(self, node: onnx.NodeProto) -> int:
        """The element type of a quantizer's codes, as ONNX infers it."""
        kind: int | None = None
        if len(node.input) > 2:
            kind = self.constants.element_type(node.input[2])
        elif node.op_type == "DequantizeLinear":
            made = self.makers.get(node.input[0])
            quantized = made is not None and made.op_type == "QuantizeLinear"
            kind = (
                self.type_of_codes(made)
                if quantized and made is not None
                else self.constants.element_type(node.input[0])
            )
        return TensorProto.UINT8 if kind is None else kind

    def is_quantized(self, node: onnx.NodeProto) -> bool:
        """Whether all that reads a node, behind clips, is a QuantizeLinear."""
        users = self.readers.get(node.output[0], [])
        while users and all(user.op_type in ("Relu", "Clip") for user in users):
            users = [reader for user in users for reader in self.readers.get(user.output[0], [])]
        return bool(users) and all(user.op_type == "QuantizeLinear" for user in users)

    def dequantizer(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that makes a tensor."""
        made = self.makers.get(name)
        return made if made is not None and made.op_type == "DequantizeLinear" else None

    def is_stored(self, name: str) -> bool:
        """Whether a tensor is stored, as floats or as codes."""
        made = self.dequantizer(name)
        return name in self.stored or (made is not None and made.input[0] in self.stored)

    def comes_from_codes(self, name: str) -> bool:
        """Whether a tensor was dequantized and has only been moved since."""
        made = self.makers.get(name)
        while made is not None and made.op_type in _MOVES:
            made = self.makers.get(made.input[0])
        return made is not None and made.op_type == "DequantizeLinear"


TARGET_KEY = "sqakd_fx.target"
"""Of a file's metadata."""
Rule = Callable[[TargetFile], Iterator[str]]


def zero_points_are_0(file: TargetFile) -> Iterator[str]:
    for node in file.quantizers():
        zero = file.constants.value(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        if zero is None or zero.any():
            yield f"{_named(node)} has a zero point that is not 0"


def codes_are_int8(file: TargetFile) -> Iterator[str]:
    for node in file.quantizers():
        kind = file.type_of_codes(node)
        if kind not in (TensorProto.INT8, TensorProto.INT4, TensorProto.INT32):
            yield f"{_named(node)} has codes of {TensorProto.DataType.Name(kind)}, not INT8"


def biases_are_float(file: TargetFile) -> Iterator[str]:
    for node in file.quantizers():
        if file.constants.element_type(node.input[0]) == TensorProto.INT32:
            yield f"{_named(node)} reads an INT32 bias"


def scales_are_positive_constants(file: TargetFile) -> Iterator[str]:
    for node in file.quantizers():
        scale = file.constants.value(node.input[1]) if node.input[1] in file.stored else None
        if scale is None:
            yield f"{_named(node)} has a scale that is computed"
        elif not (np.isfinite(scale) & (scale > 0)).all():
            yield f"{_named(node)} has a scale that is not positive"


def activations_have_one_scale(file: TargetFile) -> Iterator[str]:
    for node in file.quantizers():
        scale = file.constants.value(node.input[1])
        if node.input[0] not in file.stored and scale is not None and scale.size != 1:
            yield f"{_named(node)} has {scale.size} scales for an activation"


def weights_have_scales_along_the_output_channels(file: TargetFile) -> Iterator[str]:
    for node in file.nodes:
        read = file.dequantizer(node.input[1]) if node.op_type in _WITH_WEIGHT else None
        scale = None if read is None else file.constants.value(read.input[1])
        if read is None or scale is None or scale.size == 1 or _block_size(read):
            continue
        axis = next((a.i for a in read.attribute if a.name == "axis"), 1)
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        wanted = 1 - transposed if node.op_type == "Gemm" else _WITH_WEIGHT[node.op_type]
        if axis != wanted:
            yield f"{_named(read)} has scales along axis {axis}, not {wanted}"


def int4_weights_stand_in_blocks(file: TargetFile) -> Iterator[str]:
    """INT4 is for weights of products, of two axes: 64 or 128 values of the summed one have one scale."""
    for node in file.quantizers():
        if file.type_of_codes(node) != TensorProto.INT4:
            continue
        said = _named(node)
        if node.input[0] not in file.stored:
            yield f"{said} has INT4 codes of an activation"
            continue
        sizes, scale = list(file.stored[node.input[0]].dims), file.constants.value(node.input[1])
        block = _block_size(node)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if block not in _BLOCKS:
            yield f"{said} has blocks of {block}, not {' or '.join(map(str, _BLOCKS))}"
        elif len(sizes) != 2 or sizes[axis] % block:
            yield f"{said} has {sizes} codes, which blocks of {block} along axis {axis} do not divide"
        elif scale is None or list(scale.shape) != [
            size // block if one == axis else size for one, size in enumerate(sizes)
        ]:
            yield f"{said} has scales of another shape than its blocks"
        for user in file.readers.get(node.output[0], ()):
            transposed = any(a.name == "transB" and a.i for a in user.attribute)
            if user.op_type not in ("Gemm", "MatMul") or axis != int(transposed):
                yield f"{said} has blocks along axis {axis}, over which {_named(user)} does not sum"


def _block_size(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "block_size"), 0)


def quantizers_stand_in_pairs(file: TargetFile) -> Iterator[str]:
    for node in file.nodes:
        if node.op_type == "QuantizeLinear":
            users = {user.op_type for user in file.readers.get(node.output[0], ())}
            if users != {"DequantizeLinear"} or node.output[0] in file.outputs:
                yield f"{_named(node)} is read by {', '.join(sorted(users)) or 'nothing'}"
        elif node.op_type == "DequantizeLinear" and node.input[0] not in file.stored:
            made = file.makers.get(node.input[0])
            if made is None or made.op_type != "QuantizeLinear":
                what = "an input" if made is None else made.op_type
                yield f"{_named(node)} reads codes of {what}, not of a QuantizeLinear"


def layers_read_pairs(file: TargetFile) -> Iterator[str]:
    """Beside a quantized weight the activation is; of a sum that is quantized all inputs are, or none.

    A product of two activations, one of them in float, runs in float: a softmax by values, x by sigmoid(x).
    """
    for node in file.nodes:
        if node.op_type not in QUANTIZED_LAYERS:
            continue
        read = {name: file.dequantizer(name) is not None for name in node.input[:2]}
        missing = [name for name, quantized in read.items() if not quantized]
        if node.op_type in ("MatMul", "Mul") and not file.is_stored(node.input[1]):
            missing = [name for name in missing if file.comes_from_codes(name)]
            wrong = bool(missing)
        elif node.op_type in (*_WITH_WEIGHT, "MatMul"):
            wrong = len(node.input) > 1 and read[node.input[1]] and bool(missing)
        else:
            missing = [name for name in missing if name not in file.stored]
            wrong = any(read.values()) and bool(missing) and file.is_quantized(node)
        if wrong:
            yield f"{_named(node)} reads {missing[0]} without a pair, beside a quantized input"


def operators_are_onnx_own(file: TargetFile) -> Iterator[str]:
    for node in file.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield f"{_named(node)} is {node.op_type} of {node.domain}"


def no_type_is_smaller_than_4_bits(file: TargetFile) -> Iterator[str]:
    for name, tensor in file.stored.items():
        kind = TensorProto.DataType.Name(tensor.data_type)
        if kind.endswith("INT2"):
            yield f"{name} is stored as {kind}"


def a_fourier_transform_has_a_fixed_size(file: TargetFile) -> Iterator[str]:
    """OpenVINO reads no STFT of a signal whose size it does not know, as where the batch is free."""
    for node in file.nodes:
        if node.op_type == "STFT" and file.has_free_sizes:
            yield f"{_named(node)} is an STFT, and the batch has no fixed size"


RULES: Mapping[str, Rule] = {
    "zero points are 0": zero_points_are_0,
    "codes are INT8": codes_are_int8,
    "biases are float": biases_are_float,
    "scales are positive constants": scales_are_positive_constants,
    "activations have one scale": activations_have_one_scale,
    "weights have scales along the output channels": weights_have_scales_along_the_output_channels,
    "INT4 weights stand in blocks": int4_weights_stand_in_blocks,
    "quantizers stand in pairs": quantizers_stand_in_pairs,
    "layers read pairs": layers_read_pairs,
    "operators are ONNX's own": operators_are_onnx_own,
    "a Fourier transform has a fixed size": a_fourier_transform_has_a_fixed_size,
    "no type is smaller than 4 bits": no_type_is_smaller_than_4_bits,
}
"""By what they say, as `TARGETS` names them."""


def broken_rules(file: TargetFile, target: str) -> list[str]:
    """A sentence for each rule of a target that a file breaks, with the first place."""
    found = []
    for name in TARGETS[target].rules:
        first = next(RULES[name](file), None)
        if first is not None:
            found.append(f"{TARGETS[target].title} wants that {name}: {first}")
    return found


def check_rules(path: Path, target: str) -> None:
    """Raise ExportError for the first rule of a target that a file breaks; a target without rules takes any file."""
    if not TARGETS[target].rules:
        return
    broken = broken_rules(TargetFile(path), target)
    if broken:
        raise ExportError(f"{path.name} is no file for this target: {broken[0]}")


def _named(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])
