"""Prove from an ONNX file that no sum of two 8-bit products overflows 16 bits, on any processor.

x86 kernels without 8-bit dot products (VNNI) multiply unsigned codes a by signed codes w, and add two products in 16
bits with saturation. Over the codes that a file allows, for two weights w of one output channel that a kernel pairs,

    max a · max(|w1 + w2|, |w1|, |w2|) <= 32,767

means that no such sum overflows. Kernels of ONNX Runtime and OpenVINO pair input channels 2k and 2k + 1 of a group at
one place of the kernel (`benchmarks/pair_sums.py` shows it on a processor without VNNI). Behind an odd number of
channels, and in transposed convolutions, any two weights of a channel count as a pair. Signed codes a count as a + 128,
which kernels make of them. Two unsigned operands are multiplied in 32 bits. So are those of a depthwise convolution:
its kernels widen each byte, since no two products of a channel lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from sqakd_fx.exporters.codes_as_floats import CARRIED
from sqakd_fx.quant.levels import LARGEST_SUM
from sqakd_fx.validation.file_constants import Array, FileConstants

_WITH_WEIGHT = ("Conv", "ConvTranspose", "Gemm")
_LAYERS = (*_WITH_WEIGHT, "MatMul")
_BOUNDS = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT2: (0, 3),
    TensorProto.INT2: (-2, 1),
}
"""Element types that integer kernels multiply: the smallest and the largest code."""
_UNSIGNED = (TensorProto.UINT8, TensorProto.UINT4, TensorProto.UINT2)
_LARGEST_WEIGHT_OF_THE_RUNTIME = 127


@dataclass(frozen=True)
class PairSum:
    """The largest sum of two products in one layer.

    `activation` is the largest code of its input, `weights` the largest sum of two weights of one sign, without it.
    """

    layer: str
    activation: int
    weights: int

    @property
    def largest(self) -> int:
        return self.activation * self.weights

    @property
    def overflows(self) -> bool:
        return self.largest > LARGEST_SUM

    def sentence(self) -> str:
        return (
            f"{self.layer}: input codes up to {self.activation} and two weight codes that add up to {self.weights} "
            f"make {self.largest}, more than the {LARGEST_SUM} that x86 kernels without VNNI hold"
        )


def pair_sums(model: Path) -> tuple[PairSum, ...]:
    """Of every layer that integer kernels can compute with signed weights, in the order of the graph."""
    return tuple(_File(onnx.load(str(model), load_external_data=False), model.parent).pair_sums())


class _File:
    def __init__(self, proto: onnx.ModelProto, folder: Path) -> None:
        self.nodes = proto.graph.node
        self.constants = FileConstants(proto, folder)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.bounds: dict[str, tuple[int, int]] = {}

    def pair_sums(self) -> Iterator[PairSum]:
        for node in self.nodes:
            if node.op_type not in _LAYERS or node.domain:
                continue
            first, second = (self._dequantize(name) for name in node.input[:2])
            if first is None or self._type(first) not in _BOUNDS:
                continue
            if second is not None:
                weights = self._two_weights(node, second)
            else:
                weights = self._runtime_weights(node)
            if weights:
                _, high = self._codes(first.input[0], self._type(first))
                activation = high if self._type(first) in _UNSIGNED else high + 128
                yield PairSum(node.name or node.output[0], activation, weights)

    def _dequantize(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear whose values a layer reads, as they are or moved."""
        made = self.makers.get(name)
        while made is not None and made.op_type in CARRIED and made.op_type != "Clip":
            made = self.makers.get(made.input[0])
        return made if made is not None and made.op_type == "DequantizeLinear" else None

    def _type(self, dequantize: onnx.NodeProto) -> int:
        """The element type of the codes that a DequantizeLinear reads."""
        if len(dequantize.input) > 2:
            known = self.constants.element_type(dequantize.input[2])
            if known is not None:
                return known
        return self.constants.element_type(dequantize.input[0]) or TensorProto.UINT8

    def _two_weights(self, node: onnx.NodeProto, dequantize: onnx.NodeProto) -> int:
        """The largest sum of two codes of one sign that make a pair; 0 where kernels do not add them in 16 bits."""
        if self._type(dequantize) not in _BOUNDS or self._type(dequantize) in _UNSIGNED:
            return 0
        codes = self.constants.value(dequantize.input[0])
        if codes is not None and _is_depthwise(node, codes):
            return 0
        if codes is None:
            return 2 * max(map(abs, self._codes(dequantize.input[0], self._type(dequantize))))
        rows = _rows(node, codes).astype(np.int32)
        largest = _of_neighbours if _pairs_neighbours(node, codes) else _of_any_two
        return max(largest(rows), int(np.abs(rows).max(initial=0)))

    def _runtime_weights(self, node: onnx.NodeProto) -> int:
        """The same of a float weight beside codes, which the runtime may store in INT8 by itself; 0 for none."""
        weight = self.constants.value(node.input[1])
        if weight is None or node.op_type not in _WITH_WEIGHT or _is_depthwise(node, weight):
            return 0
        return min(2, int(weight[0].size)) * _LARGEST_WEIGHT_OF_THE_RUNTIME

    def _codes(self, name: str, element_type: int) -> tuple[int, int]:
        """The smallest and the largest code that a tensor can hold."""
        if name not in self.bounds:
            self.bounds[name] = self._found_codes(name, element_type)
        return self.bounds[name]

    def _found_codes(self, name: str, element_type: int) -> tuple[int, int]:
        value = self.constants.value(name)
        if value is not None and value.size:
            return int(value.min()), int(value.max())
        made = self.makers.get(name)
        if made is None or made.op_type not in CARRIED:
            return _BOUNDS[element_type]
        if made.op_type == "Clip":
            low, high = self._codes(made.input[0], element_type)
            least, most = (self.constants.value(x) for x in (*made.input[1:3], "", "")[:2])
            low = low if least is None else max(low, int(least))
            return low, high if most is None else min(high, int(most))
        carried = CARRIED[made.op_type]
        sources = [
            self._codes(x, element_type)
            for index, x in enumerate(made.input)
            if x and (carried is None or index in carried)
        ]
        if made.op_type == "Pad" and not any(made.input[2:3]):
            sources.append((0, 0))
        return min(low for low, _ in sources), max(high for _, high in sources)


def _is_depthwise(node: onnx.NodeProto, weight: Array) -> bool:
    groups = next((int(a.i) for a in node.attribute if a.name == "group"), 1)
    is_single = weight.ndim > 2 and weight.shape[1] == 1
    return node.op_type == "Conv" and is_single and groups == weight.shape[0]


def _pairs_neighbours(node: onnx.NodeProto, codes: Array) -> bool:
    if node.op_type == "Conv":
        return bool(codes.shape[1] % 2 == 0 or codes[0, 0].size == 1)
    return bool(node.op_type != "ConvTranspose")


def _of_neighbours(rows: Array) -> int:
    """The largest |w1 + w2| of weights 2k and 2k + 1 of (channels, weights)."""
    even = rows[:, : rows.shape[1] // 2 * 2]
    return int(np.abs(even[:, ::2] + even[:, 1::2]).max(initial=0))


def _of_any_two(rows: Array) -> int:
    """The largest sum of two weights of one channel that have one sign, of (channels, weights)."""
    if rows.shape[1] < 2:
        return 0
    both = (rows, -rows)
    return max(int(np.partition(x, -2, axis=1)[:, -2:].sum(axis=1).max(initial=0)) for x in both)


def _rows(node: onnx.NodeProto, codes: Array) -> Array:
    """The weights of each output channel in the order of kernels, (channels, weights)."""
    if node.op_type == "Conv":
        return np.moveaxis(codes, 1, -1).reshape(len(codes), -1)
    if node.op_type == "ConvTranspose":
        return np.moveaxis(codes, 1, 0).reshape(codes.shape[1], -1)
    if codes.ndim < 2:
        return codes.reshape(1, -1)
    flat = np.swapaxes(codes, -1, -2)
    if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
        flat = codes
    return flat.reshape(-1, flat.shape[-1])
