"""The runtime's profile tells which nodes take longest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import export
from sqakd_fx.runtime.node_times import longest_nodes
from sqakd_fx.runtime.session import latencies


def test_the_largest_layer_takes_longest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 2048), nn.Linear(2048, 3))
    x = torch.randn(64, 8)
    program = build_program(model.eval(), x, "w8a8")
    calibrate(program.student, [(x,)])
    path = export(program, lower(program.student).graph_module, tmp_path / "model.onnx").path
    found = longest_nodes(path, (x,), most=2)
    assert (found[0].node.partition("/")[0], found[0].operator) == ("2", "QGemm")
    assert 0.4 < found[0].share <= 1
    assert found[0].share > found[1].share
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert all(time > 0 for time in latencies([path, path], (x,), runs=2))
