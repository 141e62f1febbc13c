"""Numbers that the example's batch size made in Python are written as that size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.errors import TraceError
from sqakd_fx.frontend.trace import trace


class Reads(nn.Module):
    """A layer, and a function of it that asks for sizes as Python numbers."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.function = function
        self.register_buffer("tail", torch.tensor([8]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


def as_an_importer_reshapes(model: nn.Module, y: Tensor) -> Tensor:
    """Shape, Slice, Concat and Reshape of an ONNX file, as onnx2torch writes them."""
    shape = torch.tensor(y.shape)
    wanted = torch.cat([torch.tensor([-1]), shape[:1], model.tail])
    return y.unsqueeze(0).reshape(torch.Size(wanted)).transpose(0, 1).flatten(1)


def twice_the_batch(model: nn.Module, y: Tensor) -> Tensor:
    rows = int(torch.tensor(y.shape)[0])
    return y.reshape(2 * rows, 4).reshape(rows, 2, 4).sum(1)


def one_more_row(model: nn.Module, y: Tensor) -> Tensor:
    rows = int(torch.tensor(y.shape)[0])
    return torch.cat([y, y.new_ones(1, 8)])[1 : rows + 1]


FUNCTIONS = (as_an_importer_reshapes, twice_the_batch, one_more_row)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sizes_read_as_numbers_follow_the_batch(
    function: Callable[[nn.Module, Tensor], Tensor], batch: int
) -> None:
    model = Reads(function).eval()
    traced = trace(model, torch.randn(batch, 6))
    assert not traced.fixed_batch
    for size in (1, 2, 5, 7):
        x = torch.randn(size, 6)
        assert torch.equal(traced.graph_module(x), model(x))


def test_a_number_that_grows_otherwise_than_the_batch_is_refused() -> None:
    def squared(model: nn.Module, y: Tensor) -> Tensor:
        return y * int(torch.tensor(y.shape)[0]) ** 2

    with pytest.raises(TraceError, match="batch size"):
        trace(Reads(squared).eval(), torch.randn(2, 6))
