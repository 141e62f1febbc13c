"""The integer program and the ONNX file compute what the trained graph computes, code by code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from awkward_models import WAVE, Spectrogram
from common_models import compiled
from export_jobs import job_of
from small_graphs import code
from torch import Tensor, fx, nn

from sqakd_fx.exporters.container import TRANSLATIONS
from sqakd_fx.exporters.onnx_program import check_model, export_program, save_model, to_proto
from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.exporters.translation import Form
from sqakd_fx.ir import meta
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.validation.validate import validate


def student_and_program(
    model: nn.Module, images: Tensor, *settings: str, bits: str = "w4a4"
) -> tuple[fx.GraphModule, fx.GraphModule]:
    program = build_program(model, images, resolve_recipe(bits, settings=settings))
    calibrate(program.student, [(images,)])
    program.student.eval()
    return program.student, lower(program.student).graph_module


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def test_a_layer_its_batch_norm_and_its_clip_become_one_accumulator_and_one_requantization(
    images: Tensor,
) -> None:
    student, lowered = student_and_program(Small().eval(), images, "batch_norm=absorb")
    before = code(student)
    assert "bn = self.bn_absorbed(conv, conv_weight)" in before
    assert "relu = torch.nn.functional.relu(bn)" in before
    after = code(lowered).splitlines()
    assert [line for line in after if "torch.ops" in line] == [
        "quantize_default = torch.ops.sqakd_fx.quantize.default(x, x_scale, x_zero_point, 0, 255)",
        "conv_default = torch.ops.sqakd_fx.conv.default(quantize_default, x_scale, x_zero_point, conv_weight, "
        "conv_weight_scale, conv_accumulator_scale, conv_bias, [1, 1], [0, 0], [1, 1], 1)",
        "requantize_default = torch.ops.sqakd_fx.requantize.default(conv_default, conv_accumulator_scale, 1, "
        "relu_scale, relu_zero_point, 0, 255)",
        "dequantize_default = torch.ops.sqakd_fx.dequantize.default(requantize_default, relu_scale, relu_zero_point)",
    ]
    with torch.no_grad():
        assert torch.allclose(student(images), lowered(images), atol=1e-5)


class _Recorder(fx.Interpreter):
    """Keeps what every node computes; nodes go on from what `instead` has under the name of their quantized tensor."""

    def __init__(
        self, graph_module: fx.GraphModule, instead: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(graph_module)
        self.values: dict[str, Tensor] = {}
        self.instead = instead or {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        self.values[n.name] = value
        tag = meta.quantized_tensor(n)
        if n.op == "call_function" and tag is not None and tag.path in self.instead:
            return self.instead[tag.path].to(value.dtype)
        return value


def codes_by_tensor(student: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Codes of every activation quantizer, computed from the training graph's own float values."""
    recorder = _Recorder(student)
    with torch.no_grad():
        recorder.run(images)
    found = {}
    for node in student.graph.nodes:
        if node.op != "call_module":
            continue
        module = student.get_submodule(str(node.target))
        if isinstance(module, Quantizer) and module.role == "activation":
            name = re.sub(r"[._]output_quantizer$", "", str(node.target))
            found[name] = module.codes(recorder.values[node.args[0].name])
    return found


def assert_codes_agree(student: fx.GraphModule, lowered: fx.GraphModule, images: Tensor) -> None:
    """Every operation starts from the trained graph's own codes, so that a tie in float moves no codes but its own.

    Its codes are at most one step off, in at most one of a thousand, and the outputs are equal.
    """
    wanted = codes_by_tensor(student, images)
    recorder = _Recorder(lowered, wanted)
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(images), student(images), atol=1e-6, rtol=1e-6)
    compared = 0
    for node in lowered.graph.nodes:
        tag = meta.quantized_tensor(node)
        if tag is None or node.op != "call_function" or tag.path not in wanted:
            continue
        got = recorder.values[node.name].to(torch.int32)
        steps = (got - wanted[tag.path]).abs()
        assert steps.max() <= 1, tag.path
        assert (steps > 0).float().mean() <= 1e-3, tag.path
        compared += 1
    assert compared >= 9


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a5", "w2a2", "w1a1"])
@pytest.mark.parametrize("batch_norm", ["absorb", "fold"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_integer_program_gives_the_training_graphs_codes(
    residual_net: nn.Module, images: Tensor, bits: str, batch_norm: str, granularity: str
) -> None:
    student, lowered = student_and_program(
        residual_net, images, f"batch_norm={batch_norm}", f"granularity={granularity}", bits=bits
    )
    assert_codes_agree(student, lowered, images)


@pytest.mark.parametrize(
    "families",
    [
        ("ewgs", "ewgs"),
        ("dorefa", "dorefa"),
        ("dorefa", "pact"),
        ("lsq+", "lsq+"),
        ("sawb", "pact"),
        ("qil", "qil"),
        ("minmax", "percentile"),
    ],
)
@pytest.mark.parametrize("bits", ["w8a8", "w2a2"])
def test_every_family_lowers_exactly(
    residual_net: nn.Module, images: Tensor, families: tuple[str, str], bits: str
) -> None:
    settings = [f"weight_family={families[0]}", f"activation_family={families[1]}"]
    student, lowered = student_and_program(residual_net, images, *settings, bits=bits)
    assert_codes_agree(student, lowered, images)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2", "w1a1"])
def test_onnx_runtime_equals_the_integer_program_and_fuses_everything(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, bits: str
) -> None:
    student, lowered = student_and_program(residual_net, images, bits=bits)
    model = export_program(lowered, (images[:2],), Form(TRANSLATIONS, 21), metadata={"a": "b"})
    path = tmp_path / "model.onnx"
    save_model(model, path)
    check_model(path)
    result = validate(student, lowered, path, [(images,), (images[:3],)])
    assert result.fusion.float_heavy == ()
    affines = 2 if bits == "w1a1" else 0
    assert result.fusion.integer["QLinearConv"] == 7 + affines
    for runtime in result.runtimes:
        assert len(runtime.tensors) >= 9
        for tensor in runtime.tensors:
            assert tensor.largest <= 1, (runtime.optimization, tensor)
            assert tensor.share_above(0) <= 1e-3, (runtime.optimization, tensor)


def test_the_same_program_gives_the_same_bytes(residual_net: nn.Module, images: Tensor) -> None:
    files = []
    for _ in range(2):
        _, lowered = student_and_program(residual_net, images)
        model = export_program(lowered, (images[:2],), Form(TRANSLATIONS, 21), metadata={})
        files.append(to_proto(model).SerializeToString(deterministic=True))
    assert files[0] == files[1]


def test_tensors_are_named_after_the_users_modules_and_annotated(
    residual_net: nn.Module, images: Tensor
) -> None:
    _, lowered = student_and_program(residual_net, images)
    proto = to_proto(export_program(lowered, (images[:2],), Form(TRANSLATIONS, 21), metadata={}))
    names = {i.name for i in proto.graph.initializer}
    assert {"layers.1.conv1.weight", "layers.1.conv1.bias", "fc.weight_scale"} <= names
    notes = {a.tensor_name: a for a in proto.graph.quantization_annotation}
    assert {"layers.0.conv1.weight", "pool_quantized"} <= set(notes)
    keys = {entry.key for entry in notes["pool_quantized"].quant_parameter_tensor_names}
    assert keys == {"SCALE_TENSOR", "ZERO_POINT_TENSOR"}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


class Pooled(nn.Module):
    """A pool between two layers."""

    def __init__(self, pool: nn.Module, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first, self.pool, self.last = layer(3, 8, 3, padding=1), pool, layer(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(torch.relu(self.first(x))))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool1d(3, 2, 1, ceil_mode=True),
        nn.AdaptiveMaxPool1d(1),
        nn.AdaptiveMaxPool1d(4),
        nn.MaxPool2d(3, 2, 1),
        nn.AdaptiveMaxPool2d(1),
        nn.AdaptiveMaxPool2d((3, None)),
    ],
    ids=str,
)
def test_max_pools_of_every_kind_take_and_give_codes(pool: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = "1d" in type(pool).__name__
    net = Pooled(pool, nn.Conv1d if rows else nn.Conv2d)
    x = torch.randn(4, 3, 12) if rows else torch.randn(4, 3, 12, 12)
    program, job = job_of(net.eval(), x, "w4a4")
    path = write_profile("container", job, tmp_path / "model.onnx").path
    checked = validate(program.student.eval(), job.lowered, path, [(x,)])
    assert checked.failures == ()
    assert checked.student_difference == 0


def test_what_no_input_changes_is_computed_at_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled(Spectrogram().eval(), (WAVE,), {}, "w4a4", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    changing = {value.name for value in graph.input}
    for node in graph.node:
        if changing & set(node.input):
            changing |= set(node.output)
        else:
            assert node.op_type == "DequantizeLinear", node
    assert not [node.name for node in graph.node if node.op_type in ("Mul", "CastLike")]


def test_the_attribute_t_of_an_exported_graph_moves_codes() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x).T.T
            return self.two(y)

    x = torch.randn(16, 6)
    student, lowered = student_and_program(Transposed().eval(), x, "frontend=export", bits="w8a8")
    calls = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    assert calls.count("aten.numpy_T.default") == 2
    assert not any("dequantize.default" in call for call in calls)
    with torch.no_grad():
        (wanted,), (found,) = student(x), lowered(x)  # torch.export's graphs give tuples
    assert torch.allclose(wanted, found, atol=1e-5)
