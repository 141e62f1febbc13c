"""What an error of an activation costs the outputs, held against the outputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.program import Program, build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.measured_ranges import refine_ranges
from sqakd_fx.quant.output_gradients import Sample, felt_samples
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.quant.ranges import Range

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
BITS = {"weight_bits": 8, "activation_bits": 8, "first_last": "same"}


class Network(nn.Module):
    """Two layers with a clip between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu6(4 * self.a(x)))


def activations(program: Program) -> dict[str, Quantizer]:
    found = quantizers_of(program.student)
    return {name: one for name, one in found.items() if one.role == "activation"}


def sampled(model: nn.Module, x: Tensor = X, seed: int = 0) -> dict[str, list[Sample]]:
    program = build_program(model.eval(), x[:2], BITS)
    return felt_samples(program.student, activations(program), (x,), seed)


def test_independent_errors_cost_what_their_importance_says() -> None:
    model = Network()
    costs = []
    for seed in range(40):
        (sample,) = sampled(model, seed=seed)["x.output_quantizer"]
        assert sample.importance is not None
        assert torch.equal(sample.values[: X.numel()].sort().values, X.flatten().sort().values)
        costs.append(float(sample.importance[: X.numel()].sum()))
    error = 1e-3
    with torch.no_grad():
        y = model(X)
        changes = [model(X + error * torch.randn_like(X)) - y for _ in range(200)]
    relative = sum(float((c.norm() / y.norm()).square()) for c in changes) / len(changes)
    assert sum(costs) / len(costs) == pytest.approx(relative / error**2, rel=0.1)


def test_a_value_that_a_clip_stops_costs_nothing() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 12)
            with torch.no_grad():
                self.fc.weight.copy_(torch.eye(12))
                self.fc.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x))

    (sample,) = sampled(Clipped())["x.output_quantizer"]
    assert sample.importance is not None
    stopped, passed = (sample.importance[sample.values.sign() == s] for s in (-1, 1))
    assert float(stopped.max()) < 1e-3 * float(passed.mean())


class Classes(nn.Module):
    """Gives the number of a class, which no error changes by a little."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).argmax(1)


class Refuses(nn.Module):
    """Calls an operation that has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * torch.heaviside(x, torch.zeros_like(x)))


@pytest.mark.parametrize("model", [Classes(), Refuses()], ids=["no output", "no derivative"])
def test_where_there_is_no_gradient_all_values_count_alike(model: nn.Module) -> None:
    program = build_program(model.eval(), X[:2], BITS)
    found = felt_samples(program.student, activations(program), (X,), 0)
    assert found["x.output_quantizer"][0].importance is None
    calibrate(program.student, [(X,)], method="output")
    assert all(one.enabled for one in quantizers_of(program.student).values())


def test_sampling_leaves_parameters_as_they_are() -> None:
    program = build_program(Network().eval(), X[:2], BITS)
    before = {name: one.requires_grad for name, one in program.student.named_parameters()}
    assert True in before.values()
    felt_samples(program.student, activations(program), (X,), 0)
    assert before == {name: one.requires_grad for name, one in program.student.named_parameters()}
    assert all(one.grad is None for one in program.student.parameters())


def errors(program: Program, x: Tensor) -> dict[str, float]:
    """Squared relative error of the output with one activation quantizer alone, by its name."""
    for one in quantizers_of(program.student).values():
        one.enabled = False
    with torch.no_grad():
        y = program.student(x)
        found = {}
        for name, one in activations(program).items():
            one.enabled = True
            found[name] = float(((program.student(x) - y).norm() / y.norm()).square())
            one.enabled = False
    return found


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_no_range_ends_farther_from_the_outputs_than_it_began(factor: float) -> None:
    program = build_program(Network().eval(), X[:2], BITS)
    calibrate(program.student, [(X,)], method="mse")
    found = activations(program)
    ranges = {name: range_of(one).times(factor, factor) for name, one in found.items()}
    for name, one in found.items():
        one.start_at(ranges[name])
    before = errors(program, X[:8])
    refine_ranges(program.student, ranges, [(X[:8],)])
    assert all(one.enabled for one in quantizers_of(program.student).values())
    after = errors(program, X[:8])
    assert all(after[name] <= before[name] * (1 + 1e-6) for name in before)
    if factor != 1.0:
        assert sum(after.values()) < 0.8 * sum(before.values())


def range_of(quantizer: Quantizer) -> Range:
    grid = quantizer.grid()
    ends = [torch.tensor(float(q - grid.zero_point)) * grid.scale for q in (grid.qmin, grid.qmax)]
    return Range(*ends)
