"""What ONNX Runtime's own optimized graph runs on integer kernels, what in float, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import fx

from sqakd_fx.ir.quantized_tensors import is_own_operation
from sqakd_fx.runtime.session import session

INTEGER = ("QLinear", "QGemm", "QAttention", "MatMulInteger", "ConvInteger", "DynamicQuantize")
"""How the names of integer kernels begin."""
_HEAVY = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "FusedConv",
    "FusedMatMul",
    "FusedGemm",
    "Einsum",
    "GRU",
    "LSTM",
    "RNN",
    "Add",
    "Mul",
    "Sub",
)
_SAME = ("Sum", "ReorderInput", "ReorderOutput")
"""What hands on the values of its one input, in another layout or as they are."""
_FLOAT = onnx.TensorProto.FLOAT
_NORM = "InstanceNormalization"
_TAKEN_APART = "_inlfunc_"
"""How the runtime names what is inside an operator that it computes by others, such as HardSwish."""
_KERNELS = {
    "convolutions": (("conv",), ("QLinearConv", "ConvInteger")),
    "products": (("linear", "matmul"), ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")),
    "sums": (("add",), ("QLinearAdd",)),
}


@dataclass(frozen=True)
class Fusion:
    """What the runtime's own optimized graph runs in integers, and what in float, and why."""

    integer: dict[str, int]
    float_heavy: tuple[str, ...]
    reasons: dict[str, str]
    other: dict[str, int]


def fusion_report(model: Path, folder: Path) -> Fusion:
    """Read the graph that ONNX Runtime itself made of the model at full optimization."""
    target = folder / "optimized.onnx"
    session(model, optimized_to=target)
    proto = onnx.load(str(target), load_external_data=False)
    constants = {i.name for i in proto.graph.initializer}
    makers: dict[str, str] = {}
    for node in proto.graph.node:
        same = node.op_type in _SAME and len(node.input) == 1
        made = makers.get(node.input[0], "") if same else node.op_type
        made = _NORM if _belongs_to_norm(node, makers, constants) else made
        makers |= dict.fromkeys(node.output, made)
    readers: dict[str, list[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    told = (*proto.graph.value_info, *proto.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in told}
    integer: Counter[str] = Counter()
    other: Counter[str] = Counter()
    heavy: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type.startswith(INTEGER):
            integer[node.op_type] += 1
        elif (
            node.op_type in _HEAVY
            and kinds.get(node.output[0], _FLOAT) == _FLOAT
            and not any(name.startswith(_TAKEN_APART) for name in (*node.input, *node.output))
            and makers[node.output[0]] != _NORM
        ):
            heavy[f"{node.name or node.output[0]} ({node.op_type})"] = _why_float(
                node, makers, readers, constants
            )
        else:
            other[node.op_type] += 1
    return Fusion(dict(integer), tuple(heavy), heavy, dict(other))


def _belongs_to_norm(node: onnx.NodeProto, makers: dict[str, str], constants: set[str]) -> bool:
    """Whether a node gives a normalization its shape, its factor or its summand of each channel."""
    if not any(makers.get(name) == _NORM for name in node.input):
        return False
    has_constant = any(name in constants for name in node.input)
    return node.op_type == "Reshape" or (node.op_type in ("Mul", "Add") and has_constant)


def without_kernel(lowered: fx.GraphModule, fusion: Fusion) -> dict[str, int]:
    """How many convolutions, products and sums of the integer program have no integer kernel at runtime."""
    program = Counter(
        node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]
        for node in lowered.graph.nodes
        if is_own_operation(node)
    )
    found = {
        what: sum(program[o] for o in operations) - sum(fusion.integer.get(k, 0) for k in kernels)
        for what, (operations, kernels) in _KERNELS.items()
    }
    return {what: count for what, count in found.items() if count > 0}


def _why_float(
    node: onnx.NodeProto,
    makers: dict[str, str],
    readers: dict[str, list[str]],
    constants: set[str],
) -> str:
    """What keeps a node of the optimized graph from an integer kernel."""
    floats = [
        name
        for name in node.input
        if name and name not in constants and makers.get(name) != "DequantizeLinear"
    ]
    if floats:
        made = makers.get(floats[0])
        return (
            f"its input {floats[0]} is float, made by {made}"
            if made
            else (f"its input {floats[0]} is a float input of the model")
        )
    if any(name in constants for name in node.input):
        return "its weight or a constant is float"
    after = {reader for name in node.output for reader in readers.get(name, ["an output"])}
    if after != {"QuantizeLinear"}:
        return f"its output is read in float, by {', '.join(sorted(after))}"
    return "the runtime has no integer kernel for it in this form"
