"""Every profile computes the same function."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from awkward_models import AWKWARD
from export_jobs import job_of
from hypothesis import given, settings
from hypothesis import strategies as st
from other_forms import evaluated
from torch import Tensor, nn

from sqakd_fx.errors import ExportError, ParityError
from sqakd_fx.exporters import onnx_program
from sqakd_fx.exporters.container import TRANSLATIONS
from sqakd_fx.exporters.onnx_program import export_program
from sqakd_fx.exporters.packed import pack_codes, pack_weights
from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.exporters.translation import Form
from sqakd_fx.runtime.capabilities import CPU, Support, starts, support, table
from sqakd_fx.runtime.forms import FORMS, INT2_CAST, INT8, stored_codes
from sqakd_fx.runtime.session import execute, session
from sqakd_fx.validation.validate import validate

BITS = ("w8a8", "w4a4", "w3a3", "w2a2", "w1a1")


@pytest.mark.parametrize("family", ["lsq", "ewgs"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("profile", ["container", "packed", "typed"])
def test_a_profile_is_the_trained_function(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, profile: str, bits: str, family: str
) -> None:
    program, job = job_of(residual_net, images, bits, family)
    exported = write_profile(profile, job, tmp_path / "model.onnx")
    checked = validate(program.student, job.lowered, exported.path, [(images,)])
    assert checked.failures == ()
    if profile != "typed":
        assert checked.fusion.float_heavy == ()


EIGHT_BITS = r"conv\.|fc\.|.*short\.|.*affine\."
"""Weights of the first and the last layer, of projections, and multipliers of channels."""


def test_packed_weights_take_their_bits(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    found = {}
    for bits in BITS:
        _, job = job_of(residual_net, images, bits)
        exported = write_profile("packed", job, tmp_path / f"{bits}.onnx")
        apart = [w for w in exported.weights if re.match(EIGHT_BITS, w.name)]
        affines = 2 if bits == "w1a1" else 0
        assert [w.bits for w in apart] == [8] * (4 + affines)
        found[bits] = {w.bits for w in exported.weights if w not in apart}
    narrow = 2 if support(INT2_CAST, "CPUExecutionProvider") is Support.INTEGER else 4
    assert found == {"w8a8": {8}, "w4a4": {4}, "w3a3": {4}, "w2a2": {narrow}, "w1a1": {narrow}}


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.sampled_from(["plain", "flipped", "odd", "dead"]), min_size=1, max_size=5),
    st.data(),
)
def test_packing_gives_the_codes_back(bits: int, kinds: list[str], data: st.DataObject) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = []
    for kind in kinds:
        k = np.array(data.draw(st.lists(st.integers(low, high), min_size=3, max_size=3)))
        rows.append({"plain": k, "flipped": -k, "odd": 2 * k + 1, "dead": 0 * k}[kind])
    codes = np.stack(rows).astype(np.int8)
    packing = pack_codes(codes, (2, 4))
    assert packing is not None
    width = 2 if bits <= 2 else 4
    assert packing.bits <= width
    a, b = (x.reshape(-1, 1) if x.ndim else x for x in (packing.a, packing.b))
    assert np.array_equal(packing.stored * a + b, codes)
    back = stored_codes(packing.stored, packing.bits).numpy()
    assert np.array_equal(back.astype(np.int8), packing.stored)


def test_softmax_is_left_to_the_faster_float_operator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1), nn.Linear(6, 4)).eval()
    x = torch.randn(64, 6)
    program, job = job_of(model, x, "w8a8")
    exported = write_profile("container", job, tmp_path / "model.onnx")
    checked = validate(program.student, job.lowered, exported.path, [(x,)])
    assert checked.failures == ()
    assert checked.fusion.other["Softmax"] == 1
    assert "QLinearSoftmax" not in checked.fusion.integer


def test_the_affine_of_a_normalization_is_no_product_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Hardswish()).eval()
    x = torch.randn(8, 3, 6, 6)
    program, job = job_of(model, x, "w8a8")
    exported = write_profile("container", job, tmp_path / "model.onnx")
    checked = validate(program.student, job.lowered, exported.path, [(x,)])
    assert checked.fusion.other["InstanceNormalization"] == 1
    assert checked.fusion.other["Mul"] == 2  # of the hard-swish too
    assert checked.fusion.other["Add"] == 1
    assert checked.fusion.float_heavy == ()


class JoinedAxes(nn.Module):
    """Multiplies two sizes on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        return self.layer(x.reshape(rows * length, width))[: rows * length - 1]


def test_a_product_of_sizes_is_no_product_in_float(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 6)
    program, job = job_of(JoinedAxes().eval(), x, "w8a8")
    exported = write_profile("container", job, tmp_path / "model.onnx")
    checked = validate(program.student, job.lowered, exported.path, [(x,)])
    assert checked.fusion.other["Mul"] == 1
    assert checked.fusion.float_heavy == ()


def test_the_runtime_is_asked_what_it_can_do() -> None:
    found = table(CPU)
    integer = (
        "Conv, INT8 weight",
        "Conv, Clip below 8 bits",
        "Gemm, INT8 weight",
        "Add",
        "MaxPool of codes",
    )
    assert {found[name] for name in integer} == {Support.INTEGER}
    assert found["LayerNormalization"] is Support.FLOAT
    assert found["Conv, INT4 weight"] is not Support.INTEGER
    assert len(found) == len(FORMS)


def test_a_provider_that_does_not_start_or_leaves_work_to_the_cpu_is_noticed() -> None:
    for provider in (*ort.get_available_providers(), "NoSuchExecutionProvider"):
        found = support(INT8, provider)
        assert (found is Support.ABSENT) == (not starts(provider))
        if provider == "AzureExecutionProvider":
            assert found is Support.FALLBACK
    assert support(INT8, "NoSuchExecutionProvider") is Support.ABSENT


def test_an_operator_that_refuses_its_input_is_told_in_a_sentence(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    _, job = job_of(residual_net, images, "w4a4")
    written = write_profile("container", job, tmp_path / "model.onnx")
    feeds = {"x": np.zeros((2, 3, 1, 1), np.float32)}
    with pytest.raises(ParityError, match=r"fails when it runs \(.*\): keep that node in float"):
        execute(session(written.path), None, feeds)


def test_what_the_target_does_not_load_is_not_written(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    _, job = job_of(residual_net, images, "w2a2")
    job = replace(job, provider="NoSuchExecutionProvider")
    with pytest.raises(ExportError, match=r"model\.onnx is not written: .*NoSuchExecutionProvider"):
        write_profile("packed", job, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_target_without_small_types_gets_int8(residual_net: nn.Module, images: Tensor) -> None:
    _, job = job_of(residual_net, images, "w2a2")
    model = export_program(job.lowered, job.example, Form(TRANSLATIONS, job.opset), metadata={})
    stored, notes = pack_weights(model, "NoSuchExecutionProvider")
    assert {weight.bits for weight in stored} == {8}
    assert [note.partition(" ")[0] for note in notes] == ["2-bit", "4-bit"]


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("profile", ["container", "packed", "typed"])
@pytest.mark.parametrize("readers", [2, 3, 9])
def test_a_weight_that_several_layers_read_is_stored_once(
    profile: str, bits: str, readers: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    repeated = [nn.Linear(6, 6), nn.ReLU()] * readers
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), *repeated, nn.Linear(6, 4))
    x = torch.randn(8, 6)
    program, job = job_of(model.eval(), x, bits, "lsq", "weight_range=full")
    exported = write_profile(profile, job, tmp_path / "model.onnx")
    assert len(exported.weights) == 3
    checked = validate(program.student, job.lowered, exported.path, [(x,)])
    assert checked.failures == ()
    assert any(runtime.exact_products for runtime in checked.runtimes)


def test_the_float_profile_is_the_teacher(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    _, job = job_of(residual_net, images, "w4a4")
    exported = write_profile("float", job, tmp_path / "float.onnx")
    running = session(exported.path)
    (got,) = running.run(None, {running.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert np.allclose(got, residual_net(images).numpy(), atol=1e-4)


def test_the_pt2_profile_is_the_integer_program(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    _, job = job_of(residual_net, images, "w2a2")
    exported = write_profile("pt2", job, tmp_path / "model.pt2")
    loaded = torch.export.load(exported.path).module()
    assert torch.equal(loaded(images), job.lowered(images))


@pytest.mark.parametrize("family", ["lsq", "ewgs"])
@pytest.mark.parametrize("bits", ["w4a4", "w2a2", "w1a1"])
def test_the_qonnx_profile_follows_the_definition_of_quant(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, bits: str, family: str
) -> None:
    _, job = job_of(residual_net, images, bits, family, "batch_norm=absorb")
    exported = write_profile("qonnx", job, tmp_path / "model.onnx")
    model = onnx.load(exported.path)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Quant"] > 0
    assert "QuantizeLinear" not in kinds
    assert "DequantizeLinear" not in kinds
    got = evaluated(model, images.numpy())
    assert np.allclose(got, job.lowered(images).numpy(), atol=1e-4)


@pytest.mark.parametrize("family", ["lsq", "ewgs"])
@pytest.mark.parametrize("bits", ["w4a4", "w2a2", "w1a1"])
def test_the_qonnx_package_computes_the_same(
    residual_net: nn.Module,
    images: Tensor,
    tmp_path: Path,
    bits: str,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "the package qonnx is not installed"
    monkeypatch.setattr(onnx, "IR_VERSION", 10)  # it makes a model of every operator
    wrapper = pytest.importorskip("qonnx.core.modelwrapper", reason=reason)
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    _, job = job_of(residual_net, images, bits, family, "batch_norm=absorb")
    model = wrapper.ModelWrapper(str(write_profile("qonnx", job, tmp_path / "model.onnx").path))
    given, made = model.graph.input[0], model.graph.output[0]
    for value in (given, made):
        value.type.tensor_type.shape.dim[0].dim_value = len(images)
    found = execute_onnx(model.transform(InferShapes()), {given.name: images.numpy()})[made.name]
    assert np.allclose(found, job.lowered(images).numpy(), atol=1e-5)


class Repeated(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.relu(self.conv(x))))


@pytest.mark.parametrize("bits", ["w4a4", "w1a1"])
def test_weights_of_a_layer_that_is_called_twice_are_one_quant_in_qonnx(
    images: Tensor, tmp_path: Path, bits: str
) -> None:
    torch.manual_seed(0)
    _, job = job_of(Repeated(), images, bits)
    model = onnx.load(write_profile("qonnx", job, tmp_path / "model.onnx").path)
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convs) == 2
    assert convs[0].input[1] == convs[1].input[1]
    assert model.graph.output[0].name == "output"
    got = evaluated(model, images.numpy())
    assert np.allclose(got, job.lowered(images).numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["changed view", "sequence first", "rounded up"])
def test_codes_that_are_clipped_or_joined_with_stored_ones_are_floats_in_qonnx(
    tmp_path: Path, name: str
) -> None:
    make, example = AWKWARD[name]
    torch.manual_seed(0)
    x = torch.randn_like(example)  # the example is of another seed in each process
    _, job = job_of(make().eval(), x, "w4a4")
    got = evaluated(onnx.load(write_profile("qonnx", job, tmp_path / "model.onnx").path), x.numpy())
    expected = job.lowered(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert np.allclose(got, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("profile", ["container", "packed", "typed", "qonnx"])
def test_the_same_program_gives_the_same_bytes(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, profile: str
) -> None:
    texts = []
    for name in "ab":
        _, job = job_of(residual_net, images, "w2a2")
        texts.append(write_profile(profile, job, tmp_path / f"{name}.onnx").path.read_bytes())
    assert texts[0] == texts[1]


def test_weights_beyond_the_limit_of_protobuf_lie_beside_the_model(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, job = job_of(residual_net, images, "w8a8")
    monkeypatch.setattr(onnx_program, "_EXTERNAL_DATA_BYTES", 100)
    exported = write_profile("container", job, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").exists()
    assert validate(program.student, job.lowered, exported.path, [(images,)]).failures == ()


def test_every_quantized_tensor_says_what_it_is(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    _, job = job_of(residual_net, images, "w4a4")
    model = onnx.load(write_profile("container", job, tmp_path / "model.onnx").path)
    annotated = {note.tensor_name for note in model.graph.quantization_annotation}
    values = {v.name: {p.key: p.value for p in v.metadata_props} for v in model.graph.value_info}
    assert not any(node.metadata_props for node in model.graph.node), "it would be said twice"
    name = "layers.0.relu_1_quantized"
    assert name in annotated, annotated
    found = values[name]
    assert found["sqakd_fx.bits"] == "4"
    assert found["sqakd_fx.family"] == "lsq"
    assert found["sqakd_fx.granularity"] == "tensor"
    assert found["sqakd_fx.module"] == "layers.0"
    assert found["sqakd_fx.pass"] == "insert_quantizers"


def test_sections_read_weights_that_lie_beside_the_model(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, job = job_of(residual_net, images, "w2a2")
    monkeypatch.setattr(onnx_program, "_EXTERNAL_DATA_BYTES", 100)
    monkeypatch.setattr("sqakd_fx.validation.validate._CODES_AT_ONCE", 4000)
    exported = write_profile("packed", job, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").exists()
    assert validate(program.student, job.lowered, exported.path, [(images,)]).failures == ()


class ChangedSlice(nn.Module):
    def __init__(self, part: Any) -> None:
        super().__init__()
        self.a, self.b, self.part = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), part

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[self.part].mul_(2)
        return self.b(x)


@pytest.mark.parametrize(
    "part",
    [np.s_[:, :4], np.s_[:, 2:], np.s_[:, 3:100], np.s_[:, ::2], np.s_[:, :], np.s_[:, -3:-1]],
    ids=str,
)
def test_a_slice_that_is_changed_in_place_is_exported(tmp_path: Path, part: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    _, job = job_of(ChangedSlice(part).eval(), x, "w4a4")
    exported = write_profile("container", job, tmp_path / "model.onnx")
    (wanted,) = job.lowered(x)
    (got,) = execute(session(exported.path), None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-5)


class Unrolled(nn.Module):
    """A loop of layers that hold the same weight in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
        for cell in self.cells:
            cell.weight = self.cells[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for cell in self.cells:
            x = torch.tanh(cell(x))
        return x


def test_a_weight_that_several_modules_hold_is_stored_once(tmp_path: Path) -> None:
    x = torch.randn(8, 6)
    program, job = job_of(Unrolled().eval(), x, "w8a8")
    exported = write_profile("container", job, tmp_path / "model.onnx")
    stored = [i.name for i in onnx.load(exported.path).graph.initializer if len(i.dims) == 2]
    assert stored == ["cells.0.weight"]
    assert not validate(program.student, job.lowered, exported.path, [(x,)]).failures
