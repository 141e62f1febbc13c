"""Each rule of a target lets its own files pass, and finds the file that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import export
from sqakd_fx.targets import TARGETS
from sqakd_fx.validation.target_rules import RULES, TargetFile, broken_rules


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(x))
        y = torch.relu(self.two(y) + y)
        return self.head(y.amax((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    program = build_program(Residual().eval(), x, {"preset": "w8a8", "target": "tensorrt"})
    calibrate(program.student, [(x,)], method="minmax")
    path = tmp_path_factory.mktemp("good") / "model.onnx"
    export(program, lower(program.student).graph_module, path)
    return onnx.load(path)


def _node(model: onnx.ModelProto, kind: str, number: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == kind][number]


def _store(model: onnx.ModelProto, name: str, array: np.ndarray) -> str:
    for one in [i for i in model.graph.initializer if i.name == name]:
        model.graph.initializer.remove(one)
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def _behind(model: onnx.ModelProto, name: str, kind: str, *inputs: str) -> str:
    node = helper.make_node(kind, [name, *inputs], [f"{name}/behind"], name="behind")
    places = [i for i, n in enumerate(model.graph.node) if name in n.output]
    model.graph.node.insert(places[0] + 1 if places else 0, node)
    return node.output[0]


def _zero_point(model: onnx.ModelProto) -> None:
    _store(model, "zero_point_int8", np.array(3, np.int8))


def _unsigned(model: onnx.ModelProto) -> None:
    del _node(model, "QuantizeLinear").input[2]


def _integer_bias(model: onnx.ModelProto) -> None:
    conv = _node(model, "Conv")
    codes = _store(model, "bias_codes", np.arange(3, dtype=np.int32))
    conv.input[2] = _behind(model, codes, "DequantizeLinear", _store(model, "s", np.float32(1)))


def _zero_scale(model: onnx.ModelProto) -> None:
    _store(model, _node(model, "QuantizeLinear").input[1], np.array(0, np.float32))


def _computed_scale(model: onnx.ModelProto) -> None:
    quantize = _node(model, "QuantizeLinear")
    quantize.input[1] = _behind(model, quantize.input[1], "Identity")


def _scales_of_channels(model: onnx.ModelProto) -> None:
    _store(model, _node(model, "QuantizeLinear", 1).input[1], np.ones(3, np.float32))


def _scales_of_inputs(model: onnx.ModelProto) -> None:
    weight = _node(model, "Conv").input[1]
    (read,) = [node for node in model.graph.node if weight in node.output]
    (axis,) = [a for a in read.attribute if a.name == "axis"]
    axis.i = 1


def _moved_codes(model: onnx.ModelProto) -> None:
    read = _node(model, "DequantizeLinear")
    read.input[0] = _behind(model, read.input[0], "Identity")


def _float_activation(model: onnx.ModelProto) -> None:
    conv = _node(model, "Conv")
    conv.input[0] = model.graph.input[0].name


def _float_branch(model: onnx.ModelProto) -> None:
    add = _node(model, "Add")
    add.input[1] = _behind(model, add.input[1], "Neg")


def _own_operator(model: onnx.ModelProto) -> None:
    _node(model, "Relu").domain = "com.microsoft"


def _two_bits(model: onnx.ModelProto) -> None:
    tensor = helper.make_tensor("small", TensorProto.INT2, [4], b"\x1b", raw=True)
    model.graph.initializer.append(tensor)


def _fourier(model: onnx.ModelProto) -> None:
    inputs = [model.graph.input[0].name, _store(model, "step", np.int64(2))]
    model.graph.node.append(helper.make_node("STFT", inputs, ["spectrum"]))


def _int4(model: onnx.ModelProto, block: int, axis: int = 1) -> None:
    """The weight of the linear layer in INT4, of 128 inputs."""
    gemm = _node(model, "Gemm")
    (read,) = [node for node in model.graph.node if gemm.input[1] in node.output]
    del read.attribute[:], read.input[2:]
    read.attribute.extend(
        helper.make_attribute(*x) for x in (("axis", axis), ("block_size", block))
    )
    model.graph.initializer.append(
        helper.make_tensor("int4", TensorProto.INT4, [4, 128], bytes(256), raw=True)
    )
    shape = [4, 128 // block] if axis == 1 else [4 // block or 1, 128]
    read.input[:] = ["int4", _store(model, "block_scale", np.ones(shape, np.float32))]


def _small_blocks(model: onnx.ModelProto) -> None:
    _int4(model, 32)


def _blocks_of_channels(model: onnx.ModelProto) -> None:
    _int4(model, 64, 0)


def _scales_without_blocks(model: onnx.ModelProto) -> None:
    _int4(model, 64)
    _store(model, "block_scale", np.ones((4, 1), np.float32))


def _int4_activation(model: onnx.ModelProto) -> None:
    _store(model, "zero_point_int8", np.int8(0))
    model.graph.initializer[-1].CopyFrom(
        helper.make_tensor("zero_point_int8", TensorProto.INT4, [], bytes(1), raw=True)
    )


BREAKING: list[tuple[str, Callable[[onnx.ModelProto], None]]] = [
    ("zero points are 0", _zero_point),
    ("codes are INT8", _unsigned),
    ("biases are float", _integer_bias),
    ("scales are positive constants", _zero_scale),
    ("scales are positive constants", _computed_scale),
    ("activations have one scale", _scales_of_channels),
    ("weights have scales along the output channels", _scales_of_inputs),
    ("INT4 weights stand in blocks", _small_blocks),
    ("INT4 weights stand in blocks", _blocks_of_channels),
    ("INT4 weights stand in blocks", _scales_without_blocks),
    ("INT4 weights stand in blocks", _int4_activation),
    ("quantizers stand in pairs", _moved_codes),
    ("layers read pairs", _float_activation),
    ("layers read pairs", _float_branch),
    ("operators are ONNX's own", _own_operator),
    ("no type is smaller than 4 bits", _two_bits),
    ("a Fourier transform has a fixed size", _fourier),
]


@pytest.mark.parametrize("rule", RULES)
def test_a_file_of_the_target_keeps_every_rule(
    good: onnx.ModelProto, rule: str, tmp_path: Path
) -> None:
    onnx.save(good, tmp_path / "good.onnx")
    assert list(RULES[rule](TargetFile(tmp_path / "good.onnx"))) == []


@pytest.mark.parametrize(("rule", "break_it"), BREAKING)
def test_a_rule_finds_the_file_that_breaks_it(
    good: onnx.ModelProto,
    rule: str,
    break_it: Callable[[onnx.ModelProto], None],
    tmp_path: Path,
) -> None:
    wrong = onnx.ModelProto()
    wrong.CopyFrom(good)
    break_it(wrong)
    onnx.save(wrong, tmp_path / "wrong.onnx")
    file = TargetFile(tmp_path / "wrong.onnx")
    assert list(RULES[rule](file))
    target = next(name for name, row in TARGETS.items() if rule in row.rules)
    said = broken_rules(file, target)
    assert any(f"{TARGETS[target].title} wants that {rule}: " in sentence for sentence in said)


@pytest.mark.parametrize("block", [64, 128])
def test_int4_weights_in_blocks_keep_every_rule(
    good: onnx.ModelProto, block: int, tmp_path: Path
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(good)
    _int4(model, block)
    onnx.save(model, tmp_path / "model.onnx")
    assert broken_rules(TargetFile(tmp_path / "model.onnx"), "tensorrt") == []


def test_every_rule_is_broken_by_a_test_and_named_by_a_target() -> None:
    named = {rule for target in TARGETS.values() for rule in target.rules}
    assert {rule for rule, _ in BREAKING} == set(RULES) == named


def _product(kind: str, left: str) -> onnx.ModelProto:
    """A product of quantized x and of: its quantized transpose through a pair or without one, or a softmax."""
    quantize = ("QuantizeLinear", ["x", "s", "zero_point_int8"], "codes")
    pair = ("QuantizeLinear", ["moved", "s", "zero_point_int8"], "again")
    nodes = [
        quantize,
        ("DequantizeLinear", ["codes", "s"], "floats"),
        ("Transpose", ["floats"], "moved"),
        pair,
        ("DequantizeLinear", ["again", "s"], "read"),
        ("Softmax", ["moved"], "weights"),
        (kind, [left, "floats"], "y"),
    ]
    made = [helper.make_node(op, inputs, [out], name=out) for op, inputs, out in nodes]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in ("x", "y")]
    model = helper.make_model(helper.make_graph(made, "product", ends[:1], ends[1:]))
    _store(model, "s", np.array(0.1, np.float32))
    _store(model, "zero_point_int8", np.array(0, np.int8))
    return model


@pytest.mark.parametrize("kind", ["MatMul", "Mul"])
@pytest.mark.parametrize(("left", "found"), [("read", 0), ("weights", 0), ("moved", 1)])
def test_a_product_reads_a_pair_unless_one_factor_is_float(
    kind: str, left: str, found: int, tmp_path: Path
) -> None:
    onnx.save(_product(kind, left), tmp_path / "product.onnx")
    assert len(list(RULES["layers read pairs"](TargetFile(tmp_path / "product.onnx")))) == found
