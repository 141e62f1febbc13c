"""δ from the Hessian's trace and μ on a schedule: against a loss whose Hessian is known, and in training."""

from __future__ import annotations

import pytest
import torch
from conftest import distilled
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from sqakd_fx.program import Program, build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.features import TrainingPair
from sqakd_fx.training.gradient_schedules import hessian_deltas, mu_factor

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


class Quantized(nn.Module):
    """x on a grid: the loss is a function of the quantizer's output alone."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.quantizer = Quantizer("minmax", "activation", 4)
        self.quantizer.initialize(x, "minmax")

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x)  # type: ignore[no-any-return]


def quadratic(hessian: Tensor, slope: Tensor, student: Quantized) -> TrainingPair:
    def loss(y: Tensor, target: Tensor) -> Tensor:
        flat = y.flatten()
        return flat @ hessian @ flat / 2 + slope @ flat

    return TrainingPair(student, nn.Identity(), loss)


def expected(hessian: Tensor, slope: Tensor, student: Quantized, x: Tensor) -> float:
    """mean(diag H) / (3 std(H y + b)), with outputs in units of the quantizer's whole range."""
    width = float(student.quantizer.upper - student.quantizer.lower)
    gradient = width * (hessian @ student(x).detach().flatten() + slope).double()
    return float(width**2 * hessian.diagonal().double().mean() / (3 * gradient.std(correction=0)))


def test_delta_of_a_diagonal_quadratic_is_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    student = Quantized(x)
    hessian, slope = torch.diag(torch.rand(20) + 0.1), torch.randn(20)
    wanted = expected(hessian, slope, student, x)
    found = hessian_deltas(student, quadratic(hessian, slope, student), [(x,), (x,)], seed=3)
    assert float(found["quantizer"]) == pytest.approx(wanted, rel=1e-3)


def test_delta_of_a_full_quadratic_is_its_traces_on_average() -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 4)
    student = Quantized(x)
    root = torch.randn(20, 20)
    hessian, slope = root @ root.T / 20, torch.randn(20)
    found = hessian_deltas(student, quadratic(hessian, slope, student), [(x,)] * 300, seed=0)
    wanted = expected(hessian, slope, student, x)
    assert float(found["quantizer"]) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(("curvature", "slope"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_no_gradient_or_no_positive_curvature_gives_zero(curvature: float, slope: float) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    student = Quantized(x)
    at = student(x).detach()

    def loss(y: Tensor, target: Tensor) -> Tensor:  # its minimum is where the student stands
        return (curvature * (y - at).square() / 2 + slope * y * torch.sign(x)).sum()

    pair = TrainingPair(student, nn.Identity(), loss)
    assert float(hessian_deltas(student, pair, [(x,)], seed=0)["quantizer"]) == 0.0


def student_of(*settings: str) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    recipe = resolve_recipe("w3a3", settings=["steps=8", *settings])
    program = build_program(model, ROWS, recipe)
    calibrate(program.student, [(ROWS,)])
    distilled(program, ROWS, recipe)
    return program


def weights(program: Program) -> Tensor:
    return torch.cat([p.detach().flatten() for p in program.student.parameters()])


def test_refreshed_deltas_are_set_and_change_what_is_trained() -> None:
    plain, refreshed = student_of(), student_of("delta_refresh=2")
    deltas = [float(q.delta) for q in quantizers_of(refreshed.student).values()]
    assert max(deltas) > 0
    assert min(deltas) >= 0
    assert all(float(q.delta) == 0 for q in quantizers_of(plain.student).values())
    assert not torch.equal(weights(plain), weights(refreshed))
    never_reached = student_of("delta_refresh=8")
    assert torch.allclose(weights(plain), weights(never_reached), atol=1e-4)


def test_a_refresh_leaves_the_student_as_it_was() -> None:
    program = student_of()
    before = {k: v.clone() for k, v in program.student.state_dict().items()}
    program.student.train()
    drawn = torch.get_rng_state()
    pair = TrainingPair(program.student, program.teacher, nn.functional.mse_loss)
    hessian_deltas(program.student, pair, [(ROWS,)], seed=0)
    assert program.student.training
    assert torch.equal(drawn, torch.get_rng_state())
    after = program.student.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in program.teacher.parameters())


def test_mu_grows_from_nothing_to_its_value() -> None:
    def factors(kind: str) -> list[float]:
        recipe = resolve_recipe("w2a2", settings=["mu=0.5", f"mu_schedule={kind}"])
        return [mu_factor(recipe, step, 5) for step in range(5)]

    assert factors("constant") == [1.0] * 5
    assert factors("linear") == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert factors("cosine") == pytest.approx([0.0, 0.1464, 0.5, 0.8536, 1.0], abs=1e-4)
    trained = student_of("mu=0.5", "mu_schedule=linear")
    assert all(float(q.mu) == 0.5 for q in quantizers_of(trained.student).values())
    assert not torch.equal(weights(trained), weights(student_of("mu=0.5")))


def test_a_compiled_quantizer_follows_delta_and_mu_without_compiling_again() -> None:
    made = Quantizer("lsq", "activation", 3)
    made.initialize(ROWS.abs())
    made.modulated = True
    counter = CompileCounter()
    compiled = torch.compile(made, backend=counter, fullgraph=True)

    def gradient() -> Tensor:
        x = ROWS.abs().requires_grad_()
        compiled(x).sum().backward()
        assert x.grad is not None
        return x.grad

    first = gradient()
    for value in (0.1, 0.2, 0.3):
        made.delta.fill_(value)
        made.mu.fill_(value)
        now = gradient()
        assert not torch.equal(now, first)
        first = now
    assert counter.frame_count == 1
