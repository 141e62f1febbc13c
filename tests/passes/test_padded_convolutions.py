"""Zeros that are added in front of a convolution become its padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import export
from sqakd_fx.validation.validate import validate


class Padded(nn.Module):
    """A convolution that reads a padded activation, which may be read elsewhere too."""

    def __init__(self, pads: tuple[int, ...], *, read_again: bool = False, **settings: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, **settings)
        self.pads, self.read_again = pads, read_again

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(torch.relu(self.first(x)), self.pads)
        y = self.second(x).mean((2, 3))
        return y + F.max_pool2d(x, 2).mean((2, 3)) if self.read_again else y


def lowered(model: nn.Module, x: Tensor) -> tuple[Program, fx.GraphModule]:
    program = build_program(model.eval(), x, "w8a8")
    calibrate(program.student, [(x,)])
    return program, lower(program.student).graph_module


def pads_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    return list(graph_module.graph.find_nodes(op="call_function", target=F.pad))


def _second(graph_module: fx.GraphModule) -> fx.Node:
    """The convolution behind the pad."""
    target = torch.ops.sqakd_fx.conv.default
    return list(graph_module.graph.find_nodes(op="call_function", target=target))[-1]


@pytest.mark.parametrize(
    ("pads", "settings", "padding"),
    [
        ((1, 1, 1, 1), {}, [1, 1]),
        ((2, 2, 1, 1), {"padding": 1}, [2, 3]),
        ((0, 1, 0, 1), {"stride": 2}, [0, 0, 1, 1]),
        ((1, 2), {"padding": 1, "groups": 8}, [1, 2, 1, 3]),
        ((0, 1, 2, 0), {"dilation": 2, "groups": 2}, [2, 0, 0, 1]),
    ],
)
def test_zeros_become_padding(
    tmp_path: Path, pads: tuple[int, ...], settings: dict[str, int], padding: list[int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 9)
    program, graph_module = lowered(Padded(pads, **settings), x)
    assert not pads_of(graph_module)
    assert _second(graph_module).args[8] == padding
    exported = export(program, graph_module, tmp_path / "model.onnx")
    assert not validate(program.student, graph_module, exported.path, [(x,)]).failures


@pytest.mark.parametrize(
    ("pads", "read_again", "padding"),
    [
        ((1, 1, 1, 1), True, [1, 1]),
        ((-1, 1, 0, 0), False, [0, 0]),
        ((1, 1, 1, 1, 0, 0), False, [1, 1]),
    ],
)
def test_what_else_reads_the_zeros_or_cuts_has_its_pad(
    pads: tuple[int, ...], read_again: bool, padding: list[int]
) -> None:
    torch.manual_seed(0)
    model = Padded(pads, read_again=read_again)
    x = torch.randn(4, 3, 9, 9)
    program, graph_module = lowered(model, x)
    assert _second(graph_module).args[8] == padding
    assert bool(pads_of(graph_module)) == (model.read_again or min(model.pads) < 0)
    with torch.no_grad():
        got, wanted = graph_module(x), program.student(x)
    assert torch.allclose(got, wanted, atol=1e-4)
