"""Operations are taken apart only where one has to be, and the file computes the same in both cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.exporters.decompositions import decomposing_where_needed


class Plain(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def shapes(x: Tensor) -> Tensor:
    y = x.reshape(x.shape[0] * 2, -1).narrow(1, 1, 8).unflatten(1, (2, 4)).flatten(1)
    return y.contiguous().expand_as(y)


def kinds(x: Tensor) -> Tensor:
    small = (x > 0) & (x < 1) | (x < -1) ^ (x > 2)
    return x.to(torch.float64).to(torch.float32).to("cpu") * small.to(x.dtype)


def extremes(x: Tensor) -> Tensor:
    return torch.min(torch.max(x, x.flip(1)), x + 1)


def open_sizes(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, x.shape[0]).flatten(1)


def named_arguments(x: Tensor) -> Tensor:
    return x.narrow(dim=1, start=2, length=6).flatten(start_dim=1).to(dtype=torch.float32)


KEPT = (shapes, kinds, extremes, named_arguments)
TAKEN_APART = (
    lambda x: F.adaptive_avg_pool2d(x.reshape(-1, 1, 4, 6), (2, 2)).flatten(1),
    lambda x: x.clone().add_(1.0),
    lambda x: torch.var(x, 1),
    lambda x: open_sizes(x)[:, :3],
)


def exported(function: Callable[[Tensor], Tensor], x: Tensor) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Plain(function).eval(), (x,), dynamic_shapes=shapes)
    return decomposing_where_needed(program)


def outputs(program: torch.export.ExportedProgram, path: Path, x: Tensor) -> Tensor:
    torch.onnx.export(program, f=path, dynamo=True, optimize=False, verbose=False)
    running = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(running.run(None, {running.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("function", [*KEPT, *TAKEN_APART])
def test_the_file_computes_what_the_function_does_at_every_batch(
    function: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    program = exported(function, torch.randn(4, 24))
    for size in (1, 5):
        x = torch.randn(size, 24)
        torch.testing.assert_close(outputs(program, tmp_path / "f.onnx", x), function(x))


@pytest.mark.parametrize("function", KEPT)
def test_a_program_of_other_spellings_is_not_traced_again(
    function: Callable[[Tensor], Tensor],
) -> None:
    program = exported(function, torch.randn(4, 24))
    assert program.run_decompositions({}) is program


@pytest.mark.parametrize("function", TAKEN_APART)
def test_a_program_with_operations_to_take_apart_is_traced_again(
    function: Callable[[Tensor], Tensor],
) -> None:
    program = exported(function, torch.randn(4, 24))
    assert program.run_decompositions(dict(torch.export.default_decompositions())) is not program
