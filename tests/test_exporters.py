"""Every profile computes the same function, and a wrong file is found out and named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from sqakd_fx.exporters import onnx_program
from sqakd_fx.exporters.capabilities import CPU, Support, starts, support, table
from sqakd_fx.exporters.container import TRANSLATIONS
from sqakd_fx.exporters.forms import FORMS, INT8, stored_codes
from sqakd_fx.exporters.onnx_program import export_program
from sqakd_fx.exporters.packed import pack_codes, pack_weights
from sqakd_fx.exporters.profiles import Export, Exported, write_profile
from torch import Tensor, nn

from sqakd_fx.calibrate import calibrate
from sqakd_fx.errors import ExportError, ParityError
from sqakd_fx.exporting import export_job
from sqakd_fx.parity import first_divergence
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.recipe import resolve_recipe
from sqakd_fx.report import validation_lines
from sqakd_fx.runtime import EXACT_PRODUCTS, execute, largest_products, session
from sqakd_fx.validate import validate

BITS = ("w8a8", "w4a4", "w3a3", "w2a2", "w1a1")


def job_of(
    model: nn.Module, images: Tensor, bits: str, family: str = "lsq"
) -> tuple[Program, Export]:
    recipe = resolve_recipe(bits, settings=[f"weight_family={family}"])
    program = build_program(model, (images,), {}, recipe)
    calibrate(program.student, [(images,)])
    return program, export_job(lower(program.student).graph_module, program, recipe)


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


def test_packed_weights_take_their_bits(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    found = {}
    for bits in BITS:
        _, job = job_of(residual_net, images, bits)
        exported = write_profile("packed", job, tmp_path / f"{bits}.onnx")
        apart = [w for w in exported.weights if re.match(r"conv\.|fc\.|.*short\.", w.name)]
        assert [w.bits for w in apart] == [8, 8, 8, 8]  # two projections among them
        found[bits] = {w.bits for w in exported.weights if w not in apart}
    assert found == {"w8a8": {8}, "w4a4": {4}, "w3a3": {4}, "w2a2": {2}, "w1a1": {2}}


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


class JoinedAxes(nn.Module):
    """Multiplies two sizes on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        return self.layer(x.reshape(rows * length, width))


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
    model = export_program(
        job.lowered, job.example, translations=TRANSLATIONS, opset=job.opset, metadata={}
    )
    stored, notes = pack_weights(model, "NoSuchExecutionProvider")
    assert {weight.bits for weight in stored} == {8}
    assert [note.partition(" ")[0] for note in notes] == ["2-bit", "4-bit"]


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("profile", ["container", "packed", "typed"])
def test_a_weight_that_two_layers_read_is_stored_once(
    profile: str, bits: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer, head = nn.Linear(6, 6), nn.Linear(6, 4)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), head)
    x = torch.randn(8, 6)
    program, job = job_of(model.eval(), x, bits)
    exported = write_profile(profile, job, tmp_path / "model.onnx")
    assert len(exported.weights) == 3
    assert validate(program.student, job.lowered, exported.path, [(x,)]).failures == ()


def test_products_of_the_largest_codes_are_exact_on_every_processor() -> None:
    (sums,) = session(largest_products()).run(None, {"codes": np.full((1, 8), 255, np.uint8)})
    assert sums == 255


@pytest.mark.parametrize("overflows", [False, True])
def test_a_report_says_where_a_processor_needs_a_setting(
    overflows: bool,
    residual_net: nn.Module,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, job = job_of(residual_net, images, "w8a8")
    exported = write_profile("container", job, tmp_path / "model.onnx")
    checked = validate(program.student, job.lowered, exported.path, [(images,)])
    monkeypatch.setattr("sqakd_fx.report.overflows", lambda: overflows)
    told = " ".join(validation_lines(checked))
    assert (EXACT_PRODUCTS in told) == overflows


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


def evaluated(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """A QONNX graph by the definitions of Quant and BipolarQuant, other operators by onnx's reference."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):
        op_domain = "qonnx.custom_op.general"

        def _run(self, x, scale, zero, bits, signed=None, narrow=None, rounding_mode=None):  # type: ignore[no-untyped-def]
            assert bits > 1 or not signed, "the qonnx package computes this as bipolar"
            low = -(2 ** (bits - 1)) if signed else 0
            high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
            q = np.round(np.clip(x / scale + zero, low, high))
            return (((q - zero) * scale).astype(np.float32),)

    class BipolarQuant(OpRun):
        op_domain = "qonnx.custom_op.general"

        def _run(self, x, scale):  # type: ignore[no-untyped-def]
            return ((np.where(x >= 0, 1, -1) * scale).astype(np.float32),)

    running = ReferenceEvaluator(model, new_ops=[Quant, BipolarQuant])
    (y,) = running.run(None, {model.graph.input[0].name: x})
    return y  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["lsq", "ewgs"])
@pytest.mark.parametrize("bits", ["w4a4", "w2a2", "w1a1"])
def test_the_qonnx_profile_follows_the_definition_of_quant(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, bits: str, family: str
) -> None:
    _, job = job_of(residual_net, images, bits, family)
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

    _, job = job_of(residual_net, images, bits, family)
    model = wrapper.ModelWrapper(str(write_profile("qonnx", job, tmp_path / "model.onnx").path))
    given, made = model.graph.input[0], model.graph.output[0]
    for value in (given, made):
        value.type.tensor_type.shape.dim[0].dim_value = len(images)
    found = execute_onnx(model.transform(InferShapes()), {given.name: images.numpy()})[made.name]
    assert np.allclose(found, job.lowered(images).numpy(), atol=1e-5)


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
    nodes = {
        o: {p.key: p.value for p in n.metadata_props} for n in model.graph.node for o in n.output
    }
    name = "layers.0.relu_1_quantized"
    assert name in annotated, annotated
    for found in (values[name], nodes[name]):
        assert found["sqakd_fx.bits"] == "4"
        assert found["sqakd_fx.family"] == "lsq"
        assert found["sqakd_fx.granularity"] == "tensor"
        assert found["sqakd_fx.module"] == "layers.0"
        assert found["sqakd_fx.pass"] == "insert_quantizers"


def test_validation_in_many_sections_finds_what_one_section_finds(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, job = job_of(residual_net, images, "w4a4")
    path = write_profile("container", job, tmp_path / "model.onnx").path
    change(path, "layers.0.conv2.bias", lambda x: x + np.int32(40))
    found = []
    for most in (1 << 27, 4000, 1):
        monkeypatch.setattr("sqakd_fx.validate._CODES_AT_ONCE", most)
        found.append(validate(program.student, job.lowered, path, [(images,), (images[:3],)]))
    assert found[0] == found[1] == found[2]
    (first, *_) = (first_divergence(runtime.tensors) for runtime in found[0].runtimes)
    assert first is not None
    assert (first.name, first.producer) == ("layers.0.bn2_quantized", "Conv")


def test_sections_read_weights_that_lie_beside_the_model(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, job = job_of(residual_net, images, "w2a2")
    monkeypatch.setattr(onnx_program, "_EXTERNAL_DATA_BYTES", 100)
    monkeypatch.setattr("sqakd_fx.validate._CODES_AT_ONCE", 4000)
    exported = write_profile("packed", job, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").exists()
    assert validate(program.student, job.lowered, exported.path, [(images,)]).failures == ()


def change(path: Path, name: str, how: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite one initializer of a file."""
    model = onnx.load(path)
    (stored,) = [i for i in model.graph.initializer if i.name == name]
    stored.CopyFrom(numpy_helper.from_array(how(numpy_helper.to_array(stored)), name))
    onnx.save(model, path)


@pytest.fixture
def exported(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> tuple[Program, Export, Exported]:
    program, job = job_of(residual_net, images, "w4a4")
    return program, job, write_profile("container", job, tmp_path / "model.onnx")


WRONG = {
    "activation scale": ("layers.0.relu_1.scale", lambda x: x * np.float32(1.0001), "layers.0.relu_1_quantized"),
    "weight scale": ("layers.1.conv1.weight_scale", lambda x: x * np.float32(1.0001), "layers.1.conv1.weight"),
    "zero point": ("layers.0.bn2.zero_point", lambda x: x + np.uint8(1), "layers.0.bn2_quantized"),
    "bias": ("layers.0.conv2.bias", lambda x: np.roll(x, 1), "layers.0.conv2.bias"),
    "weight": ("fc.weight", lambda x: np.roll(x, 1), "fc.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_number_in_the_file_is_caught_and_named(
    exported: tuple[Program, Export, Exported], images: Tensor, case: str
) -> None:
    program, job, written = exported
    name, how, telling = WRONG[case]
    change(written.path, name, how)
    checked = validate(program.student, job.lowered, written.path, [(images,)])
    assert any(failure.startswith(telling) for failure in checked.failures), checked.failures


def without_clip(model: onnx.ModelProto) -> None:
    clip = next(n for n in model.graph.node if n.op_type == "Clip" and "relu_1" in n.output[0])
    maker = next(n for n in model.graph.node if n.output[0] == clip.input[0])
    maker.output[0] = clip.output[0]
    model.graph.node.remove(clip)


def with_swapped_weights(model: onnx.ModelProto) -> None:
    readers = [
        next(n for n in model.graph.node if name in n.input)
        for name in ("layers.0.conv1.weight", "layers.0.conv2.weight")
    ]
    first, second = (list(reader.input) for reader in readers)
    readers[0].input[:], readers[1].input[:] = second, first


def with_shifted_padding(model: onnx.ModelProto) -> None:
    """Padding (2, 0) for (1, 1): the same shape, other values."""
    conv = next(n for n in model.graph.node if n.name == "layers.0.conv2/Conv")
    (pads,) = (a for a in conv.attribute if a.name == "pads")
    pads.ints[:] = [2, 2, 0, 0]


def with_a_scale_of_its_own(model: onnx.ModelProto) -> None:
    """One of the operators that read the codes behind the pool reads them with another scale."""
    pool = next(n for n in model.graph.node if n.op_type == "MaxPool")
    reader = next(n for n in model.graph.node if n.input[0] == pool.output[0])
    (scale,) = (i for i in model.graph.initializer if i.name == reader.input[1])
    value = numpy_helper.to_array(scale) * np.float32(1.0001)
    model.graph.initializer.append(numpy_helper.from_array(value, "own"))
    reader.input[1] = "own"


def without_a_tensor(model: onnx.ModelProto) -> None:
    """The name of a quantized tensor is lost, with its annotation."""
    name = "layers.0.bn2_quantized"
    for node in model.graph.node:
        node.input[:] = ["nameless" if x == name else x for x in node.input]
        node.output[:] = ["nameless" if x == name else x for x in node.output]
    notes = [n for n in model.graph.quantization_annotation if n.tensor_name != name]
    values = [v for v in model.graph.value_info if v.name != name]
    del model.graph.quantization_annotation[:], model.graph.value_info[:]
    model.graph.quantization_annotation.extend(notes)
    model.graph.value_info.extend(values)


MISWIRED = {
    "missing clip": (without_clip, "layers.0.relu_1_quantized"),
    "swapped weights": (with_swapped_weights, "layers.0.relu_1_quantized"),
    "shifted padding": (with_shifted_padding, "layers.0.bn2_quantized"),
    "a scale behind a pool": (with_a_scale_of_its_own, "relu_quantized"),
    "lost tensor": (without_a_tensor, "layers.0.bn2_quantized"),
}


@pytest.mark.parametrize("case", MISWIRED)
def test_a_wrong_graph_in_the_file_is_caught_and_named(
    exported: tuple[Program, Export, Exported], images: Tensor, case: str
) -> None:
    program, job, written = exported
    how, telling = MISWIRED[case]
    model = onnx.load(written.path)
    how(model)
    onnx.save(model, written.path)
    checked = validate(program.student, job.lowered, written.path, [(images * 9,)])
    assert any(telling in failure for failure in checked.failures), checked.failures


@pytest.mark.parametrize("profile", ["packed", "typed"])
def test_a_wrong_number_is_caught_and_named_in_small_files_too(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, profile: str
) -> None:
    program, job = job_of(residual_net, images, "w2a2")
    path = write_profile(profile, job, tmp_path / "model.onnx").path
    change(path, "layers.1.conv2.bias", lambda x: np.roll(x, 1))
    model = onnx.load(path)
    makers = {n.output[0]: n for n in model.graph.node}
    for reader in model.graph.node:
        origin = reader.input[0] if reader.op_type == "DequantizeLinear" else ""
        while origin in makers and makers[origin].op_type in ("Cast", "Mul", "Add"):
            origin = makers[origin].input[0]
        if origin == "layers.1.conv1.weight":
            change(path, reader.input[1], lambda x: x * np.float32(1.0001))
    failures = validate(program.student, job.lowered, path, [(images,)]).failures
    for name in ("layers.1.conv2.bias", "layers.1.conv1.weight"):
        assert any(failure.startswith(name) for failure in failures), failures


def with_own(model: onnx.ModelProto, node: onnx.NodeProto, index: int, value: np.ndarray) -> None:
    """Give one operator a stored input of its own; others may share the old one."""
    model.graph.initializer.append(numpy_helper.from_array(value, "own"))
    node.input[index] = "own"


def stored(model: onnx.ModelProto, name: str) -> np.ndarray:
    (found,) = (i for i in model.graph.initializer if i.name == name)
    return numpy_helper.to_array(found)


def maker_of(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    """The QuantizeLinear of an activation, in front of its Clip where there is one."""
    makers = {n.output[0]: n for n in model.graph.node}
    maker = makers[tensor]
    return makers[maker.input[0]] if maker.op_type == "Clip" else maker


def with_a_scale_off(model: onnx.ModelProto) -> None:
    maker = maker_of(model, "layers.0.relu_1_quantized")
    with_own(model, maker, 1, stored(model, maker.input[1]) * np.float32(1.0001))


def with_a_swapped_zero_point(model: onnx.ModelProto) -> None:
    """The zero point of another tensor."""
    maker, other = (maker_of(model, f"layers.0.{x}_quantized") for x in ("relu_1", "bn2"))
    assert stored(model, maker.input[2]) != stored(model, other.input[2])
    maker.input[2] = other.input[2]


def with_one_channel_off(model: onnx.ModelProto) -> None:
    """The scale of one channel of a weight, in all that reads it."""
    makers = {n.output[0]: n for n in model.graph.node}
    for reader in model.graph.node:
        origin = reader.input[0] if reader.op_type == "DequantizeLinear" else ""
        while origin in makers and makers[origin].op_type in ("Cast", "Mul", "Add"):
            origin = makers[origin].input[0]
        if origin == "layers.1.conv1.weight":
            scale = stored(model, reader.input[1]).copy()
            assert scale.shape == (16,)
            scale[3] *= np.float32(1.0001)
            with_own(model, reader, 1, scale)


WRONG_EXPORTS = {
    "a scale off by 1e-4": (with_a_scale_off, "layers.0.relu_1_quantized"),
    "a swapped zero point": (with_a_swapped_zero_point, "layers.0.relu_1_quantized"),
    "a missing clip": (without_clip, "layers.0.relu_1_quantized"),
    "the scale of one channel off by 1e-4": (with_one_channel_off, "layers.1.conv1.weight"),
}


@pytest.mark.parametrize("case", WRONG_EXPORTS)
@pytest.mark.parametrize("profile", ["container", "packed", "typed"])
def test_a_deliberately_wrong_export_is_caught_and_named(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, profile: str, case: str
) -> None:
    program, job = job_of(residual_net, images, "w4a4")
    path = write_profile(profile, job, tmp_path / "model.onnx").path
    how, telling = WRONG_EXPORTS[case]
    model = onnx.load(path)
    how(model)
    onnx.save(model, path)
    failures = validate(program.student, job.lowered, path, [(images * 9,)]).failures
    assert any(telling in failure for failure in failures), failures
