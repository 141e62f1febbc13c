"""OpenVINO runs the files of its target: code by code from the same codes, passes on and off."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from default_sessions import NETWORKS

from sqakd_fx.errors import ExportError, ParityError
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import check_export, export
from sqakd_fx.runtime.openvino import OpenVinoModel
from sqakd_fx.validation.validate import validate

IS_INSTALLED = importlib.util.find_spec("openvino") is not None


def _program(name: str, bits: str, profile: str) -> Program:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    recipe = {"preset": bits, "target": "openvino", "profile": profile}
    program = build_program(model.eval(), inputs, recipe)
    calibrate(program.student, [program.traced.call.flatten(inputs, {})], method="minmax")
    return program


def test_weights_of_2_bits_are_stored_in_4(tmp_path: Path) -> None:
    program = _program("residual", "w2a2", "packed")
    exported = export(program, lower(program.student).graph_module, tmp_path / "model.onnx")
    assert {weight.bits for weight in exported.weights} == {4, 8}
    assert any("2-bit storage" in note for note in exported.notes)


def test_a_constant_that_is_multiplied_is_float_and_the_file_is_the_student(
    tmp_path: Path,
) -> None:
    program = _program("masked", "w8a8", "container")
    lowered = lower(program.student).graph_module
    path = export(program, lowered, tmp_path / "model.onnx").path
    graph = onnx.load(path).graph
    stored = {i.name for i in graph.initializer}
    (product,) = [node for node in graph.node if node.op_type == "Mul"]
    assert stored.intersection(product.input)
    checked = validate(program.student, lowered, path, [program.example])
    assert checked.failures == ()
    assert "with_item_quantized" in {t.name for t in checked.runtimes[0].tensors}


def test_a_fourier_transform_of_a_free_batch_is_told_before_training() -> None:
    program = _program("spectrogram", "w8a8", "container")
    with pytest.raises(ExportError, match="OpenVINO wants that a Fourier transform"):
        check_export(program)


@pytest.mark.skipif(IS_INSTALLED, reason="OpenVINO is installed")
def test_without_openvino_the_extra_is_named() -> None:
    with pytest.raises(ParityError, match=r"pip install 'sqakd-fx\[openvino\]'"):
        OpenVinoModel(Path("model.onnx"), low_precision=True)


@pytest.mark.skipif(not IS_INSTALLED, reason="pip install openvino")
@pytest.mark.parametrize(("name", "bits"), [("residual", "w2a2"), ("masked", "w8a8")])
def test_openvino_computes_the_student_from_the_same_codes(
    name: str, bits: str, tmp_path: Path
) -> None:
    program = _program(name, bits, "packed")
    lowered = lower(program.student).graph_module
    path = export(program, lowered, tmp_path / "model.onnx").path
    checked = validate(program.student, lowered, path, [program.example], runtime="openvino")
    assert checked.failures == ()
    titles = [run.title for run in checked.runtimes if run.provider == "OpenVINO"]
    assert titles == [
        "OpenVINO CPU, low-precision passes off",
        "OpenVINO CPU, low-precision passes on",
    ]
    for run in checked.runtimes:
        assert run.tensors
        assert max(tensor.largest for tensor in run.tensors) <= 1
