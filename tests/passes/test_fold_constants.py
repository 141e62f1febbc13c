"""What parameters alone make is a parameter, and sizes that no batch changes are numbers."""

from __future__ import annotations

import torch
from small_graphs import before_and_after, traced
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.fold_constants import FoldConstants


class Standardized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean())


def test_a_standardized_weight_is_a_parameter() -> None:
    before, after = before_and_after(Standardized(), torch.randn(4, 6), FoldConstants())
    assert "sub = weight - mean" in before
    assert after.splitlines() == [
        "weight_sub = self.weight_sub",
        "linear = torch._C._nn.linear(x, weight_sub)",
        "return linear",
    ]
    folded = run_passes(traced(Standardized(), torch.randn(4, 6)), [FoldConstants()]).graph_module
    assert [name for name, _ in folded.named_parameters()] == ["weight_sub"]


def test_sizes_that_no_batch_changes_are_numbers() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.size(0), x.size(1) * x.size(2))

    before, after = before_and_after(Flat(), torch.randn(4, 3, 5), FoldConstants())
    assert "mul = size_1 * size_2" in before
    assert after.splitlines() == [
        "size = x.size(0)",
        "reshape = x.reshape(size, 15)",
        "return reshape",
    ]


def test_bounds_of_a_slice_that_are_buffers_are_numbers() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bounds", torch.tensor([1, 4]))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.bounds[0] : self.bounds[1]]

    _, after = before_and_after(Sliced(), torch.randn(4, 6), FoldConstants())
    assert after.splitlines() == [
        "getitem_2 = x[(slice(None, None, None), slice(1, 4, None))]",
        "return getitem_2",
    ]


def test_a_list_of_slices_is_read_as_torch_reads_it() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bounds", torch.tensor([1, 4]))

        def forward(self, x: Tensor) -> Tensor:
            return x[[slice(None), slice(self.bounds[0], self.bounds[1])]]

    _, after = before_and_after(Sliced(), torch.randn(4, 6), FoldConstants())
    assert after.splitlines()[0] == "getitem_2 = x[(slice(None, None, None), slice(1, 4, None))]"


class Cell(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight)) + torch.tanh(x @ (2 * self.weight))


class Unrolled(nn.Module):
    """Cells that hold the same weight, as an importer of ONNX writes a loop."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(6, 6))
        self.cells = nn.Sequential(*(Cell(weight) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)  # type: ignore[no-any-return]


def test_what_is_made_of_one_parameter_in_one_way_is_one_parameter() -> None:
    folded = run_passes(traced(Unrolled(), torch.randn(4, 6)), [FoldConstants()]).graph_module
    names = [name for name, _ in folded.named_parameters()]
    assert [name for name in names if name.endswith("mul")] == ["cells.0.weight_mul"]
