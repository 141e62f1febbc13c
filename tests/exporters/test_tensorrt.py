"""A file for TensorRT: INT8 about zero point 0, float biases, pairs in front of layers; the student code by code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ResidualNet
from default_sessions import NETWORKS
from onnx import TensorProto, numpy_helper
from torch import nn

from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import check_export, export, export_job
from sqakd_fx.validation.validate import validate


def _program(model: nn.Module, inputs: object, target: str, bits: str) -> Program:
    program = build_program(model.eval(), inputs, {"preset": bits, "target": target})  # type: ignore[arg-type]
    calibrate(program.student, [program.traced.call.flatten((inputs,), {})], method="minmax")
    return program


@pytest.mark.parametrize(
    ("name", "bits"),
    [("attention by hand", "w8a8"), ("u-net", "w4a4"), ("shared", "w8a8"), ("masked", "w2a2")],
)
def test_the_file_is_the_student_code_by_code(name: str, bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    program = build_program(model.eval(), inputs, {"preset": bits, "target": "tensorrt"})
    example = program.traced.call.flatten(inputs, {})
    calibrate(program.student, [example], method="minmax")
    lowered = lower(program.student).graph_module
    exported = export(program, lowered, tmp_path / "model.onnx")
    checked = validate(program.student, lowered, exported.path, [example])
    assert (checked.failures, checked.target) == ((), "tensorrt")
    for runtime in checked.runtimes:
        assert runtime.tensors
        assert max(tensor.largest for tensor in runtime.tensors) == 0


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.GraphProto:
    torch.manual_seed(0)
    program = _program(ResidualNet(), torch.randn(4, 3, 16, 16), "tensorrt", "w8a8")
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    export(program, lower(program.student).graph_module, path)
    return onnx.load(path).graph


def test_codes_are_int8_and_relus_stand_in_front_of_their_quantizers(
    graph: onnx.GraphProto,
) -> None:
    stored = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    makers = {name: node.op_type for node in graph.node for name in node.output}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {stored[node.input[2]].dtype for node in quantizers} == {np.dtype(np.int8)}
    assert not any(stored[node.input[2]].any() for node in quantizers)
    assert {makers.get(node.input[0]) for node in quantizers} >= {"Relu", "Conv", "MaxPool", None}
    kinds = {i.data_type for i in graph.initializer}
    assert not kinds & {TensorProto.UINT8, TensorProto.INT32}


def test_a_pooled_tensor_has_a_pair_in_front_of_the_layers_that_read_it(
    graph: onnx.GraphProto,
) -> None:
    makers = {name: node for node in graph.node for name in node.output}
    (pool,) = [node for node in graph.node if node.op_type == "MaxPool"]
    assert makers[pool.input[0]].op_type == "DequantizeLinear"
    (quantize,) = [n for n in graph.node if pool.output[0] in n.input]
    assert quantize.op_type == "QuantizeLinear"
    convs = [n for n in graph.node if n.op_type == "Conv"]
    assert {makers[n.input[0]].op_type for n in convs} == {"DequantizeLinear"}


def test_every_code_is_described_by_its_new_range(graph: onnx.GraphProto) -> None:
    notes = {v.name: {p.key: p.value for p in v.metadata_props} for v in graph.value_info}
    relu = notes["relu_quantized"]
    assert (relu["sqakd_fx.qmin"], relu["sqakd_fx.qmax"]) == ("0", "127")
    annotated = {note.tensor_name for note in graph.quantization_annotation}
    assert {"x_quantized", "relu_quantized"} <= annotated


def test_one_training_of_signed_grids_is_a_file_of_each_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    program = _program(net, x, "tensorrt", "w4a4")
    lowered = lower(program.student).graph_module
    for target in ("onnxruntime", "tensorrt", "openvino"):
        path = export(program, lowered, tmp_path / f"{target}.onnx", target=target).path
        checked = validate(program.student, lowered, path, [(x,)])
        assert (checked.failures, checked.target) == ((), target)
    assert export(program, lowered, tmp_path / "model.qonnx.onnx", target="qonnx").path.exists()


def test_an_unsigned_8_bit_grid_is_refused_with_what_to_train(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = _program(ResidualNet(), torch.randn(4, 3, 16, 16), "onnxruntime", "w8a8")
    lowered = lower(program.student).graph_module
    wanted = (
        r"relu_quantized: codes from 0 to 255 about zero point 0 .* train with --target tensorrt"
    )
    with pytest.raises(ExportError, match=wanted):
        export(program, lowered, tmp_path / "model.onnx", target="tensorrt")
    assert not list(tmp_path.iterdir())


class Mixed(nn.Module):
    """Layers of 4 bits beside a pooled tensor of 8, and a sum of both whose codes would fit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.first(x)), 2)
        y = self.two(torch.relu(self.one(x))) + x
        return self.last(torch.relu(self.three(y)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [ResidualNet, Mixed])
def test_few_unsigned_8_bit_grids_are_rounded_in_float_and_it_is_said(
    model: type[nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    program = _program(model(), x, "onnxruntime", "w4a4")
    lowered = lower(program.student).graph_module
    exported = export(program, lowered, tmp_path / "model.onnx", target="tensorrt")
    assert "layers run in float" in exported.notes[0]
    assert "codes from 0 to 255" in exported.notes[0]
    checked = validate(program.student, lowered, exported.path, [(torch.randn(64, 3, 16, 16),)])
    assert (checked.failures, checked.target) == ((), "tensorrt")
    assert max(t.largest for runtime in checked.runtimes for t in runtime.tensors) <= 1
    graph = onnx.load(exported.path).graph
    assert {node.op_type for node in graph.node} >= {"Round", "QuantizeLinear"}
    assert not {i.data_type for i in graph.initializer} & {TensorProto.UINT8, TensorProto.INT32}


def test_a_target_that_does_not_fit_is_told_before_training() -> None:
    torch.manual_seed(0)
    program = _program(ResidualNet(), torch.randn(4, 3, 16, 16), "tensorrt", "w8a8")
    for quantizer in program.student.modules():
        if hasattr(quantizer, "signed"):
            quantizer.signed = False
    with pytest.raises(ExportError, match="zero point 0"):
        check_export(program)


class Rows(nn.Module):
    """Linear layers of 128 and of 100 inputs, with a norm of its own on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.one, self.two = (
            nn.Linear(16, 128),
            nn.Linear(128, 100),
            nn.Linear(100, 128),
        )
        self.three, self.leave = nn.Linear(128, 64), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.one(torch.relu(self.enter(x))))
        return self.leave(torch.relu(self.three(torch.relu(self.two(y)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("block", "shape"), [(64, [100, 2]), (128, [100, 1])])
def test_int4_weights_in_blocks_are_the_student_code_by_code(
    block: int, shape: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    recipe = {"preset": "w4a8", "target": "tensorrt", "int4_block": block}
    program = build_program(Rows().eval(), x, recipe)
    calibrate(program.student, [(x,)], method="minmax")
    lowered = lower(program.student).graph_module
    exported = export(program, lowered, tmp_path / "model.onnx")
    checked = validate(program.student, lowered, exported.path, [(x,)])
    assert checked.failures == ()
    assert max(t.largest for runtime in checked.runtimes for t in runtime.tensors) == 0
    stored = {i.name: i for i in onnx.load(exported.path).graph.initializer}
    kinds = {name: i.data_type for name, i in stored.items() if name.endswith(".weight")}
    assert {name for name, kind in kinds.items() if kind == TensorProto.INT4} == {
        "one.weight",
        "three.weight",
    }
    scale = numpy_helper.to_array(stored["one.weight_block_scale"])
    assert list(scale.shape) == shape
    assert (scale == scale[:, :1]).all()
    assert {w.name: w.bits for w in exported.weights}["one.weight"] == 4


def test_no_weight_in_int4_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = _program(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU()), torch.randn(4, 6), "tensorrt", "w8a8"
    )
    job = export_job(lower(program.student).graph_module, program)
    exported = write_profile("tensorrt", replace(job, int4_block=64), tmp_path / "model.onnx")
    assert exported.notes[0].startswith("no weight is stored in INT4")


@pytest.mark.parametrize("profile", ["container", "packed", "qonnx"])
def test_a_profile_without_int4_blocks_says_so(profile: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    program = _program(net, torch.randn(4, 6), "onnxruntime", "w8a8")
    job = export_job(lower(program.student).graph_module, program)
    exported = write_profile(profile, replace(job, int4_block=64), tmp_path / "model.onnx")
    assert (
        exported.notes[-1]
        == "model.onnx has no INT4 blocks of 64: int4_block is for the target tensorrt"
    )
