"""Files are right in sessions with default options: proved from the file, and seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from default_sessions import compared, exported, feeds, outputs
from emulated import EMULATOR, emulated_outputs
from export_jobs import job_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.quant.levels import LARGEST_SUM
from sqakd_fx.results.markdown import validation_lines
from sqakd_fx.runtime.session import EXACT_PRODUCTS, overflows, session
from sqakd_fx.validation.pair_sums import pair_sums
from sqakd_fx.validation.validate import validate

PROFILES = ("container", "packed", "typed")


SAMPLE = [
    ("the example", "w8a8", "container"),
    ("residual", "w8a8", "container"),
    ("depthwise, 1 axes", "w8a8", "container"),
    ("depthwise, 2 axes", "w8a8", "container"),
    ("depthwise, 2 axes", "w8a8", "packed"),
    ("depthwise, 3 axes", "w8a8", "container"),
    ("masked", "w8a8", "packed"),
    ("residual", "w4a4", "container"),
    ("attention", "w4a4", "packed"),
    ("residual", "w2a2", "packed"),
]
"""Every network in every width and both profiles: `benchmarks/sessions.py`."""


@pytest.mark.parametrize(("name", "bits", "profile"), SAMPLE)
def test_a_session_with_default_options_equals_one_with_exact_products(
    name: str, bits: str, profile: str, tmp_path: Path
) -> None:
    found = compared(name, bits, profile, tmp_path)
    assert found.are_equal
    assert found.emulated in (True, None)
    assert not found.overflows
    if bits == "w8a8":  # nothing that fits is given away
        assert found.largest_weights >= 100


def test_depthwise_weights_take_all_of_int8_and_others_keep_their_pairs(tmp_path: Path) -> None:
    found = compared("depthwise, 2 axes", "w8a8", "container", tmp_path)
    assert 120 <= found.largest_weights <= 128
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    codes = {i.name: numpy_helper.to_array(i) for i in stored if i.data_type == TensorProto.INT8}
    largest = {c.shape[1] == 1: int(np.abs(c).max()) for c in codes.values() if c.ndim == 4}
    assert largest[True] == 127
    assert 64 < largest[False] <= 127


@pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 is not installed")
@pytest.mark.parametrize("name", ["the example", "residual", "attention", "depthwise, 2 axes"])
def test_a_file_is_right_on_an_emulated_processor_without_vnni(name: str, tmp_path: Path) -> None:
    ran = {}
    for weight_range in ("paired", "full"):
        folder = tmp_path / weight_range
        folder.mkdir()
        path, inputs = exported(name, "w8a8", "container", folder, weight_range)
        got = emulated_outputs(path, feeds(path, inputs))
        ran[weight_range] = map(np.array_equal, outputs(path, inputs, True), got)
    assert all(ran["paired"])
    assert not all(ran["full"])  # so the processor is one of those that overflow


@pytest.mark.parametrize("processor", ["with VNNI", "without"])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_file_that_can_overflow_fails_on_every_processor(
    residual_net: nn.Module,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    profile: str,
    processor: str,
) -> None:
    program, job = job_of(residual_net, images, "w4a4")
    path = write_profile(profile, job, tmp_path / "model.onnx").path
    monkeypatch.setattr("sqakd_fx.validation.runs.overflows", lambda: processor == "without")
    assert validate(program.student, job.lowered, path, [(images,)]).failures == ()
    model = onnx.load(path)
    (stored,) = (i for i in model.graph.initializer if i.name == "fc.weight")
    codes = numpy_helper.to_array(stored).copy()
    codes[3, :2] = (65, 64)
    stored.CopyFrom(numpy_helper.from_array(codes, "fc.weight"))
    onnx.save(model, path)
    failures = validate(program.student, job.lowered, path, [(images,)]).failures
    told = "two weight codes that add up to 129 make 32895, more than the 32767"
    assert any("fc" in failure and told in failure for failure in failures), failures


@pytest.mark.parametrize("processor", ["with VNNI", "without"])
def test_of_all_of_int8_the_exact_session_is_judged_and_the_need_is_told(
    residual_net: nn.Module,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processor: str,
) -> None:
    program, job = job_of(residual_net, images, "w8a8", "lsq", "weight_range=full")
    path = write_profile("container", job, tmp_path / "model.onnx").path
    without = processor == "without"
    if not without and overflows():
        pytest.skip("the session with default options is wrong on this processor")
    monkeypatch.setattr("sqakd_fx.validation.runs.overflows", lambda: without)
    checked = validate(program.student, job.lowered, path, [(images,)])
    assert checked.failures == ()
    assert checked.full_range
    ran = {(r.optimization, r.exact_products): r.judged for r in checked.runtimes}
    assert ran == {("off", False): True, ("full", False): not without, ("full", True): True}
    assert checked.deployed.exact_products == without
    told = " ".join(validation_lines(checked))
    assert EXACT_PRODUCTS in told
    assert ("not judged" in told) == without


def test_all_of_int8_beside_few_activation_bits_needs_nothing(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    asked = ("weight_range=full", "first_last=same", "projections=same", "residual_bits=7")
    program, job = job_of(residual_net, images, "w8a7", "lsq", *asked)
    path = write_profile("container", job, tmp_path / "model.onnx").path
    checked = validate(program.student, job.lowered, path, [(images,)])
    assert checked.failures == ()
    assert not checked.full_range
    assert [r.exact_products for r in checked.runtimes] == [False, False]
    told = validation_lines(checked)
    assert any("exact on every processor with default options" in line for line in told)
    assert EXACT_PRODUCTS not in " ".join(told)


def layer_file(
    path: Path,
    operator: str,
    weight: np.ndarray,
    bounds: tuple[int, int] | None = None,
    kind: type[np.generic] = np.uint8,
    **attributes: Any,
) -> Path:
    """QuantizeLinear → (Clip) → DequantizeLinear → one operator with a stored weight."""
    constants: dict[str, Any] = {"scale": np.float32(1), "zero": kind(0), "w": weight}
    constants["w_zero"] = weight.dtype.type(0)
    codes = "codes"
    nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"])]
    if bounds is not None:
        constants |= {"low": kind(bounds[0]), "high": kind(bounds[1])}
        nodes.append(helper.make_node("Clip", ["codes", "low", "high"], ["clipped"]))
        codes = "clipped"
    nodes += [
        helper.make_node("DequantizeLinear", [codes, "scale", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "w_zero"], ["b"]),
        helper.make_node(operator, ["a", "b"], ["y"], name="layer", **attributes),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    stored = [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any], int, int, bool]] = {
    "Conv": ((4, 6, 2, 2), {}, 0, 6, True),
    "Conv of one place": ((4, 5, 1, 1), {}, 0, 5, True),
    "Conv of an odd number of channels": ((4, 3, 2, 2), {}, 0, 3, False),
    "ConvTranspose": ((4, 4, 2, 2), {}, 1, 4, False),
    "Gemm": ((5, 4), {}, 1, 5, True),
    "Gemm transposed": ((4, 5), {"transB": 1}, 0, 5, True),
    "MatMul": ((5, 4), {}, 1, 5, True),
    "Conv of two groups": ((4, 2, 2, 2), {"group": 2}, 0, 2, True),
    "Conv of one channel": ((4, 1, 2, 2), {}, 0, 1, False),
    "Conv with a multiplier": ((4, 1, 2, 2), {"group": 2}, 0, 1, False),
}
"""Shape of the weight, attributes, axis of the output channels, number of input channels, whether these make pairs."""


@pytest.mark.parametrize("layer", LAYERS)
def test_the_bound_is_that_of_every_pair_that_kernels_make(layer: str, tmp_path: Path) -> None:
    shape, attributes, axis, channels, side_by_side = LAYERS[layer]

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 255))
    def equal(seed: int, most: int) -> None:
        codes = np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)
        path = layer_file(tmp_path / "m.onnx", layer.split()[0], codes, (0, most), **attributes)
        (found,) = pair_sums(path)
        largest = 0
        for row in np.moveaxis(codes.astype(int), axis, 0).reshape(shape[axis], channels, -1):
            places = row.T.reshape(-1)  # channels lie side by side, at one place of the kernel
            together = range(0, len(places) - 1, 2) if side_by_side else range(len(places))
            for i in together:
                others = (i + 1,) if side_by_side else range(i)
                both = [np.array([places[i], places[j]]) for j in others]
                ends = [max(pair.clip(0).sum(), -pair.clip(max=0).sum()) for pair in both]
                largest = max([largest, *ends])
        largest = max(largest, int(np.abs(codes.astype(int)).max()))
        assert (found.layer, found.activation, found.weights) == ("layer", most, largest)
        assert found.overflows == (most * largest > LARGEST_SUM)

    equal()


def test_signed_activations_count_as_the_unsigned_codes_that_kernels_make_of_them(
    tmp_path: Path,
) -> None:
    weight = np.full((4, 2), 64, np.int8)
    path = layer_file(tmp_path / "m.onnx", "MatMul", weight, (-10, 10), np.int8)
    assert pair_sums(path)[0].activation == 138


def test_two_unsigned_operands_are_multiplied_in_32_bits(tmp_path: Path) -> None:
    path = layer_file(tmp_path / "m.onnx", "MatMul", np.full((64, 8), 255, np.uint8))
    assert pair_sums(path) == ()
    x = np.full((4, 64), 255, np.float32)
    (got,) = session(path).run(None, {"x": x})
    assert (got == 64 * 255 * 255).all()


def test_a_depthwise_convolution_is_multiplied_in_32_bits(tmp_path: Path) -> None:
    weight = np.full((4, 1, 3, 3), 127, np.int8)
    assert pair_sums(layer_file(tmp_path / "m.onnx", "Conv", weight, group=4)) == ()


def test_the_largest_pair_that_the_proof_allows_is_exact_here(tmp_path: Path) -> None:
    path = layer_file(tmp_path / "m.onnx", "MatMul", np.full((64, 8), 64, np.int8))
    (pair,) = pair_sums(path)
    assert pair.largest == 32640
    (got,) = session(path).run(None, {"x": np.full((4, 64), 255, np.float32)})
    assert (got == 64 * 255 * 64).all()


def test_a_float_weight_that_the_runtime_may_store_in_int8_is_counted(tmp_path: Path) -> None:
    path = layer_file(tmp_path / "m.onnx", "Conv", np.ones((4, 3, 1, 1), np.int8))
    model = onnx.load(path)
    reader = next(n for n in model.graph.node if n.output[0] == "b")
    model.graph.node.remove(reader)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "b"))
    onnx.save(model, path)
    (pair,) = pair_sums(path)
    assert (pair.activation, pair.weights) == (255, 254)
