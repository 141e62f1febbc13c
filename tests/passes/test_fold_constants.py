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
