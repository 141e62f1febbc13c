"""The kernels that ONNX Runtime makes of a file, and what each stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.runtime.kernels import Kernel, kernels_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.end = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = torch.sigmoid(x + torch.relu(self.two(x)))
        return self.end(x.mean((2, 3)).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kernel, ...]:
    folder = tmp_path_factory.mktemp("kernels")
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    program = sqakd_fx.build_program(Net(), images[:2], "w8a8")
    sqakd_fx.calibrate(program, images)
    lowered = sqakd_fx.lower(program.student).graph_module
    path = sqakd_fx.export(program, lowered, folder / "model.onnx").path
    return kernels_of(path, folder)


def test_a_convolution_stands_for_what_was_fused(kernels: tuple[Kernel, ...]) -> None:
    one = next(kernel for kernel in kernels if kernel.layer == "one")
    assert (one.operator, one.kind) == ("QLinearConv", "integer")
    assert one.made_of == ("3 DequantizeLinear", "Conv", "QuantizeLinear")
    assert one.grid == "relu"


def test_integers_floats_and_conversions_are_told_apart(kernels: tuple[Kernel, ...]) -> None:
    kinds = {kernel.operator: kernel.kind for kernel in kernels}
    assert kinds["QLinearConv"] == "integer"
    assert kinds["QuantizeLinear"] == "conversion"
    assert kinds["Sigmoid" if "Sigmoid" in kinds else "QLinearSigmoid"] in ("float", "integer")


def test_the_edges_lead_from_earlier_kernels_and_shapes_are_left_out(
    kernels: tuple[Kernel, ...],
) -> None:
    assert all(source < place for place, one in enumerate(kernels) for source in one.inputs)
    assert "Shape" not in {kernel.operator for kernel in kernels}
    assert sum(not kernel.inputs for kernel in kernels) == 1
