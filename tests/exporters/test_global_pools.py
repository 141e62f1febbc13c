"""A global average pool in float is a mean in the file, however its input lies in memory."""

from __future__ import annotations

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

_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class Pooled(nn.Module):
    """A linear layer behind a pool over all spatial axes of a transposed tensor."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.sin(x).transpose(1, 2).reshape(-1, 6, *[2] * self.axes)
        y: Tensor = self.head(torch.flatten(_POOLS[self.axes](maps, 1), 1))
        return y


@pytest.mark.parametrize("axes", _POOLS)
def test_it_is_a_mean(axes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2**axes, 6)
    program = build_program(Pooled(axes).eval(), (x,), {"preset": "w8a8"})
    samples = [program.traced.call.flatten((x,), {})]
    calibrate(program.student, samples, method="minmax")
    lowered = lower(program.student).graph_module
    exported = export(program, lowered, tmp_path / "model.onnx")
    assert validate(program.student, lowered, exported.path, samples).failures == ()
    written = {node.op_type for node in onnx.load(exported.path).graph.node}
    assert not written & {"Loop", "If", "Scan", "GatherND"}
