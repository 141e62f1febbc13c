"""What ONNX has no operation for is written in a few that it has, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import export
from sqakd_fx.validation.validate import validate

Function = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """Functions behind a quantized layer, each in front of a layer of its own."""

    def __init__(self, shape: tuple[int, ...], functions: list[Function]) -> None:
        super().__init__()
        self.functions = functions
        self.first = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](shape[1], 4, 1)
        self.last = nn.ModuleList(nn.LazyLinear(2) for _ in functions)
        self(torch.zeros(shape))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.relu(self.first(x))
        return [last(f(x)) for f, last in zip(self.functions, self.last, strict=True)]


def written(shape: tuple[int, ...], functions: list[Function], path: Path) -> onnx.ModelProto:
    """The file of such a network, once it is found to be exact."""
    torch.manual_seed(0)
    model, x = Between(shape, functions), torch.randn(shape)
    program = build_program(model.eval(), x, "w8a8")
    calibrate(program.student, [(x,)], method="minmax")
    lowered = lower(program.student).graph_module
    export(program, lowered, path)
    failures = validate(program.student, lowered, path, [(x,)]).failures
    assert [f for f in failures if "predictions" not in f] == []
    return onnx.load(path)


POOLS: dict[tuple[int, ...], list[Function]] = {
    (2, 1, 6007): [
        lambda x: F.adaptive_avg_pool1d(x, 10),
        lambda x: F.adaptive_avg_pool1d(x, 300),
        lambda x: F.adaptive_max_pool1d(x, 300),
    ],
    (2, 2, 48, 57): [
        lambda x: F.adaptive_avg_pool2d(x, (7, 5)),
        lambda x: F.adaptive_avg_pool2d(x, (16, 50)),
        lambda x: F.adaptive_max_pool2d(x, (31, 19)),
        lambda x: F.interpolate(x, size=(11, 60), mode="area"),
    ],
    (2, 1, 9, 14, 20): [
        lambda x: F.adaptive_avg_pool3d(x, (4, 7, 6)),
        lambda x: F.adaptive_avg_pool3d(x, 3),
        lambda x: F.adaptive_max_pool3d(x, (4, 7, 6)),
    ],
}


@pytest.mark.parametrize("shape", POOLS, ids=str)
def test_windows_of_any_number_and_size_are_a_few_operations(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = written(shape, POOLS[shape], tmp_path / "model.onnx")
    assert len(model.graph.node) <= 20 * len(POOLS[shape])


def test_a_float_file_has_them_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 5003)
    model = Between((2, 1, 5003), [lambda x: F.adaptive_avg_pool1d(x, 10)]).eval()
    program = build_program(model, x, "w8a8")
    calibrate(program.student, [(x,)], method="minmax")
    lowered = lower(program.student).graph_module
    made = export(program, lowered, tmp_path / "model.onnx", profile="float")
    assert len(onnx.load(made.path).graph.node) < 20


def _pair_of(f: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Function:
    def together(x: Tensor) -> Tensor:
        values, places = f(x)
        return values + 0.01 * places

    return together


def test_running_results_and_ordered_values(tmp_path: Path) -> None:
    functions: list[Function] = [
        lambda x: x.cumprod(-1),
        _pair_of(lambda x: x.cummax(-1)),
        _pair_of(lambda x: x.cummin(1)),
        lambda x: x.kthvalue(3, -1, keepdim=True)[0].expand(-1, -1, 2),
        lambda x: x.median(1)[0],
        lambda x: torch.median(x, -1, keepdim=True).values.expand(-1, -1, 2),
    ]
    model = written((2, 3, 37), functions, tmp_path / "model.onnx")
    assert len(model.graph.node) < 300


def test_functions_of_one_value_and_stacks(tmp_path: Path) -> None:
    functions: list[Function] = [
        lambda x: torch.hypot(x, x - 1),
        lambda x: torch.copysign(x + 1, x - 0.5),
        lambda x: x * torch.isin((3 * x).round(), torch.tensor([1.0, 2.0])),
        lambda x: torch.dstack([x.mean(2), x.amax(2)]),
        lambda x: torch.hstack([x, x.flip(1)]),
        lambda x: torch.column_stack([x.mean(2), x.amax(2)]),
        lambda x: (x.double() * x.double()).mean(2).float(),
    ]
    written((2, 3, 9), functions, tmp_path / "model.onnx")
