"""Hard-swish and SiLU of codes: a gate of 256 levels, in training, in the integer program and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_jobs import job_of
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.gated import GATED, HardSwishByCodes, SiluByCodes
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.quant.ranges import Range
from sqakd_fx.recipe.keys import Override
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.results.saved_graph import decode_graph, encode_graph, tensors_in
from sqakd_fx.runtime.openvino import OpenVinoModel
from sqakd_fx.validation.validate import validate

SWISHES = {"hardswish": nn.Hardswish, "silu": nn.SiLU}
IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 3


def _net(swish: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        SWISHES[swish](),
        nn.Conv2d(8, 8, 3, groups=8),
        SWISHES[swish](inplace=True),
        nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


def _calibrated(swish: str, recipe: Any = "w8a8", **changes: Any) -> Program:
    recipe = resolve_recipe(recipe).model_copy(update=changes)
    program = build_program(_net(swish), IMAGES, recipe)
    calibrate(program.student, [(IMAGES,)])
    return program


def _gates(program: Program) -> int:
    return sum(isinstance(one, tuple(GATED.values())) for one in program.student.modules())


@pytest.fixture
def quantizer() -> Quantizer:
    made = Quantizer("minmax", "activation", 8)
    with torch.no_grad():
        made.start_at(Range(torch.tensor(-6.0), torch.tensor(9.0)))
    made.enabled = True
    return made.requires_grad_(False)


@pytest.fixture(params=SWISHES)
def swish(request: pytest.FixtureRequest) -> str:
    """The operation that gates itself."""
    return str(request.param)


def _in_float64(swish: str, x: Tensor) -> Tensor:
    x = x.double()
    return x * ((x + 3).clamp(0, 6) / 6 if swish == "hardswish" else torch.sigmoid(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_gate_is_within_half_a_level_of_the_function(
    quantizer: Quantizer, training: bool, swish: str
) -> None:
    x = quantizer(torch.linspace(-7, 10, 4001))
    gated = GATED[swish](quantizer).train(training)(x)
    away = (gated - _in_float64(swish, x)).abs()
    assert bool((away <= x.abs() * (0.5 / 254) + 1e-6).all())


def test_a_saturated_gate_is_one_or_nothing(quantizer: Quantizer) -> None:
    x = quantizer(torch.linspace(-7, 10, 4001))
    gated = HardSwishByCodes(quantizer).eval()(x)
    ends = (x >= 3) | (x <= -3)
    assert torch.equal(gated[ends], torch.where(x >= 3, x, 0.0)[ends])


def test_the_gradient_is_that_of_the_function(quantizer: Quantizer, swish: str) -> None:
    x = torch.linspace(-5, 5, 101).requires_grad_()
    (got,) = torch.autograd.grad(GATED[swish](quantizer)(x).sum(), x)
    exact = F.hardswish if swish == "hardswish" else F.silu
    (wanted,) = torch.autograd.grad(exact(x).sum(), x)
    assert torch.equal(got, wanted)


def test_without_a_grid_it_is_the_function(quantizer: Quantizer, swish: str) -> None:
    quantizer.enabled = False
    x = torch.linspace(-5, 5, 101)
    exact = F.hardswish if swish == "hardswish" else F.silu
    assert torch.equal(GATED[swish](quantizer)(x), exact(x))


def test_no_code_has_a_sigmoid_that_the_last_bit_rounds(quantizer: Quantizer) -> None:
    """Of 500 grids; at a scale of 1 / 254 some have one, which shows that the scale matters."""
    draw = np.random.default_rng(0)
    near = moved = 0
    for _ in range(500):
        low, high = -draw.uniform(0.5, 12), draw.uniform(0.5, 12)
        with torch.no_grad():
            quantizer.start_at(Range(torch.tensor(low), torch.tensor(high)))
        scale, zero = (float(x) for x in quantizer.scale_and_zero_point())
        sigmoid = 1 / (1 + np.exp((zero - np.arange(256)) * scale))
        chosen = float(SiluByCodes(quantizer).gate().scale)
        assert 0.998 < chosen * 254 <= 1 + 1e-6
        assert _from_a_tie(sigmoid / chosen) > 2e-4
        near += _from_a_tie(sigmoid * 254) < 2e-4
        moved += chosen * 254 < 1 - 1e-6
    assert 5 < near <= moved < 50


def _from_a_tie(steps: np.ndarray[Any, Any]) -> float:
    return float(np.abs(steps - np.floor(steps) - 0.5).min())


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2"])
def test_the_file_computes_what_was_trained(swish: str, bits: str, tmp_path: Path) -> None:
    program = _calibrated(swish, bits)
    assert _gates(program) == 2
    lowered = lower(program.student).graph_module
    exported = export(program, lowered, tmp_path / "model.onnx")
    held_out = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(2)) * 3
    checked = validate(program.student, lowered, exported.path, [(IMAGES,), (held_out,)], {})
    assert checked.failures == ()


def _kernels(path: Path) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def test_the_runtime_computes_it_on_codes(swish: str, tmp_path: Path) -> None:
    write_profile("container", job_of(_net(swish), IMAGES, "w8a8")[1], tmp_path / "model.onnx")
    kernels = _kernels(tmp_path / "model.onnx")
    gate = {"hardswish": "QLinearAdd", "silu": "QLinearSigmoid"}[swish]
    assert kernels.count(gate) == kernels.count("QLinearMul") == 2
    assert not {"HardSigmoid", "HardSwish", "Sigmoid", "QuickGelu", "Mul", "Add"} & set(kernels)


@pytest.mark.parametrize("profile", ["packed", "typed", "encodings"])
def test_every_onnx_format_is_as_near_to_float(swish: str, profile: str, tmp_path: Path) -> None:
    """In encodings a tensor has one scale; codes that saturate are floats that are clipped."""
    path = tmp_path / "model.onnx"
    write_profile(profile, job_of(_net(swish), IMAGES, "w8a8")[1], path)
    with torch.no_grad():
        wanted = _net(swish)(IMAGES)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    got = torch.from_numpy(made)
    assert float((got - wanted).norm() / wanted.norm()) < 0.02


def test_the_qonnx_package_computes_the_gates(
    swish: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "IR_VERSION", 10)  # it makes a model of every operator
    wrapper = pytest.importorskip("qonnx.core.modelwrapper", reason="qonnx is not installed")
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    _, job = job_of(_net(swish), IMAGES, "w8a8")
    program = wrapper.ModelWrapper(str(write_profile("qonnx", job, tmp_path / "model.onnx").path))
    given, made = program.graph.input[0], program.graph.output[0]
    for value in (given, made):
        value.type.tensor_type.shape.dim[0].dim_value = len(IMAGES)
    found = execute_onnx(program.transform(InferShapes()), {given.name: IMAGES.numpy()})
    with torch.no_grad():
        wanted = job.lowered(IMAGES)
    got = torch.from_numpy(found[made.name])
    assert float((got - wanted).norm() / wanted.norm()) < 2e-3


@pytest.mark.parametrize("profile", ["pt2", "pt2e", "litert"])
def test_every_program_of_torch_gives_what_was_trained(
    swish: str, profile: str, tmp_path: Path
) -> None:
    import torch.ao.quantization.fx._decomposed

    _, job = job_of(_net(swish), IMAGES, "w8a8")
    write_profile(profile, job, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        wanted, got = job.lowered(IMAGES), program(IMAGES)
    got = got[0] if isinstance(got, tuple | list) else got
    assert float((got - wanted).norm() / wanted.norm()) < 2e-3


def test_openvino_computes_the_gates(swish: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "model.onnx"
    _, job = job_of(_net(swish), IMAGES, "w8a8")
    write_profile("container", job, path)
    (made,) = OpenVinoModel(path, low_precision=True)(None, {"input": IMAGES.numpy()})
    with torch.no_grad():
        wanted = job.lowered(IMAGES)
    assert float((torch.from_numpy(made) - wanted).norm() / wanted.norm()) < 2e-3


def test_a_gate_is_in_float_where_its_input_is_or_a_recipe_says_so(swish: str) -> None:
    first = Override.model_validate({"match": "0", "exact": True, "float": True})
    assert _gates(_calibrated(swish, override=(first,))) == 1
    second = Override.model_validate({"match": "_4", "float": True})
    assert _gates(_calibrated(swish, override=(second,))) == 1


def test_a_product_of_matrices_is_gated_in_float(swish: str) -> None:
    """The runtime gives it in float: its codes would be one more pass."""
    program = build_program(
        nn.Sequential(nn.Linear(6, 16), SWISHES[swish](), nn.Linear(16, 4)).eval(),
        torch.randn(8, 6),
        resolve_recipe("w8a8"),
    )
    assert _gates(program) == 0


def test_a_target_with_signed_codes_has_no_gate_of_codes(swish: str) -> None:
    program = _calibrated(swish, target="tensorrt")
    assert _gates(program) == 0


def test_a_saved_student_has_its_gates_again(swish: str) -> None:
    student = _calibrated(swish).student
    made = decode_graph(encode_graph(student), tensors_in(student))
    with torch.no_grad():
        assert torch.equal(made(IMAGES), student(IMAGES))


def _step(net: nn.Module, x: Tensor) -> float:
    net.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    return float(loss.detach())


def test_a_compiled_step_is_the_step(swish: str) -> None:
    student = _calibrated(swish).student.train()
    eager = _step(student, IMAGES)
    wanted = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    compiled = _step(torch.compile(student), IMAGES)  # type: ignore[arg-type]
    got = [p.grad for p in student.parameters() if p.grad is not None]
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(got, wanted, strict=True))
