"""A result folder of a small classifier, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sqakd_fx

pytest.importorskip("plotly", reason="the HTML report needs plotly")


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6)).eval()
    images = torch.randn(96, 1, 8, 8)
    out = tmp_path_factory.mktemp("report") / "net"
    recipe = {"steps": 2, "batch_size": 16, "learning_rate": 1e-5, "activation_bits": 8}
    labelled = [(images[:40], net(images[:40]).argmax(1))]
    done = sqakd_fx.quantize(
        net,
        images,
        example_inputs=images[:2],
        recipe=recipe,
        out=out,
        eval_data=labelled,
        progress=False,
    )
    assert done is not None
    return out
