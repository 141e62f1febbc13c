"""Where a model will run: one row of `TARGETS` for each runtime, which decides what is trained, written and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TargetName = Literal["onnxruntime", "tensorrt", "openvino"]
"""The targets that a recipe can name; their files are validated in ONNX Runtime."""
ExportTargetName = Literal[
    "onnxruntime", "tensorrt", "openvino", "executorch", "litert", "qnn", "qonnx"
]
"""The targets that a result can be exported for: all rows of `TARGETS`."""


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        title: its name, in words.
        profile: of the file that is written; None where the recipe's `profile` says it.
        signed: 8-bit activations train on codes about zero point 0, of which one-sided values use 7 bits.
        smallest_weights: bits of the smallest type in which weights may be stored.
        quantized_constants: tensors that no input changes may be quantized.
        adds_pairs: some of its processors add two products in 16 bits, so that their sums must fit.
        rules: what a file must keep, by the names of `validation.target_rules.RULES`.
        package: what runs it in Python, where `validate` can.
        seen: what has been run on it.
    """

    title: str
    profile: str | None
    signed: bool
    smallest_weights: int
    quantized_constants: bool
    adds_pairs: bool
    rules: tuple[str, ...]
    package: str
    seen: str


TARGETS: Mapping[str, Target] = {
    "onnxruntime": Target(
        title="ONNX Runtime",
        profile=None,
        signed=False,
        smallest_weights=2,
        quantized_constants=True,
        adds_pairs=True,
        rules=(),
        package="onnxruntime",
        seen="every file, on the CPU, by `validate`",
    ),
    "tensorrt": Target(
        title="TensorRT",
        profile="tensorrt",
        signed=True,
        smallest_weights=8,
        quantized_constants=True,
        adds_pairs=False,
        rules=(
            "zero points are 0",
            "codes are INT8",
            "biases are float",
            "scales are positive constants",
            "activations have one scale",
            "weights have scales along the output channels",
            "INT4 weights stand in blocks",
            "quantizers stand in pairs",
            "layers read pairs",
            "operators are ONNX's own",
        ),
        package="tensorrt",
        seen="no file: the rules of its documentation are checked, and ONNX Runtime runs the file",
    ),
    "openvino": Target(
        title="OpenVINO",
        profile=None,
        signed=False,
        smallest_weights=4,
        quantized_constants=False,
        adds_pairs=True,
        rules=("no type is smaller than 4 bits", "a Fourier transform has a fixed size"),
        package="openvino",
        seen="the example and 11 networks on a CPU, by `validate --runtime openvino`",
    ),
    "executorch": Target(
        title="ExecuTorch",
        profile="pt2e",
        signed=False,
        smallest_weights=8,
        quantized_constants=True,
        adds_pairs=False,
        rules=(),
        package="executorch",
        seen="32 of 38 programs, on a CPU with XNNPACK; it refuses the others (`benchmarks/on_executorch.py`)",
    ),
    "litert": Target(
        title="LiteRT",
        profile="litert",
        signed=False,
        smallest_weights=8,
        quantized_constants=True,
        adds_pairs=False,
        rules=(),
        package="litert_torch",
        seen="17 of 20 networks, on a CPU; its converter refuses the others (`benchmarks/on_litert.py`)",
    ),
    "qnn": Target(
        title="Qualcomm QNN",
        profile="encodings",
        signed=False,
        smallest_weights=4,
        quantized_constants=True,
        adds_pairs=False,
        rules=(),
        package="aimet_onnx",
        seen="no file on a device: AIMET 2.42 simulates the encodings of the tests (`docs/targets.md`)",
    ),
    "qonnx": Target(
        title="FINN and other QONNX flows",
        profile="qonnx",
        signed=False,
        smallest_weights=1,
        quantized_constants=True,
        adds_pairs=False,
        rules=(),
        package="qonnx",
        seen="files of the tests, executed by the qonnx package",
    ),
}
"""The rows, by what `--target` calls them. `executorch`, `litert`, `qnn` and `qonnx` are exported from any result: they
need no grids of their own."""
