"""Numbers that the example's batch size made in Python are written as that size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx import stages
from sqakd_fx.errors import SourceError, TraceError
from sqakd_fx.frontend.trace import trace
from sqakd_fx.program import build_program


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


class Together(nn.Module):
    """A shape that was written for one sample takes more of them as one with more positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(1, 6, -1).permute(0, 2, 1)


@pytest.mark.parametrize(
    ("function", "together"),
    [
        (lambda y: y.reshape(1, 6, -1), True),
        (lambda y: y.flatten(1).flatten()[None], True),
        (lambda y: y.flatten(2).permute(2, 0, 1), False),
        (lambda y: y.permute(0, 2, 3, 1).reshape(-1, 6), False),
        (lambda y: y.flatten(1) @ y.flatten(1).T, False),
    ],
    ids=["as one", "in one row", "batch behind positions", "positions", "pairs"],
)
def test_a_model_that_puts_samples_together_takes_the_examples_batch_only(
    function: Callable[[Tensor], Tensor], together: bool
) -> None:
    class Model(Together):
        def forward(self, x: Tensor) -> Tensor:
            return function(self.conv(x))

    assert trace(Model().eval(), torch.randn(1, 3, 8, 8)).fixed_batch is together


def test_data_of_another_batch_size_is_refused_before_training() -> None:
    program = build_program(Together().eval(), torch.randn(1, 3, 8, 8), "w8a8")
    with pytest.raises(SourceError, match=r"a batch of 4, and the model takes .* 1 only"):
        stages.calibrate(program, [torch.randn(4, 3, 8, 8) for _ in range(6)])


def test_torch_export_refuses_a_model_that_puts_samples_together() -> None:
    with pytest.raises(TraceError, match="samples of another together"):
        trace(Together().eval(), torch.randn(2, 3, 8, 8), front_end="export")
