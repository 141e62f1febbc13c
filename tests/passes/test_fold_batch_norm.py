"""BatchNorm goes into the layer in front of it."""

from __future__ import annotations

import pytest
import torch
from small_graphs import before_and_after, calls, traced
from torch import Tensor, nn

from sqakd_fx.errors import PassError
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.fold_batch_norm import FoldBatchNorm


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def test_the_layer_has_a_weight_and_a_bias_of_both(images: Tensor) -> None:
    before, after = before_and_after(Normalized(), images, Canonicalize(), FoldBatchNorm())
    assert "conv = torch.conv2d(x, conv_weight, None, (1, 1), (0, 0), (1, 1), 1)" in before
    assert "bn = self.bn(conv)" in before
    assert after.splitlines() == [
        "conv_weight_folded = self.conv.weight_folded",
        "conv_bias_folded = self.conv.bias_folded",
        "conv = torch.conv2d(x, conv_weight_folded, conv_bias_folded, (1, 1), (0, 0), (1, 1), 1)",
        "relu = torch.nn.functional.relu(conv)",
        "return relu",
    ]


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=True, groups=3)
        self.bn = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.up_bn = nn.BatchNorm2d(4)
        self.grouped_up = nn.ConvTranspose2d(4, 6, 2, 2, groups=2)
        self.grouped_bn = nn.BatchNorm2d(6)
        self.late = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.fc_bn = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = self.grouped_bn(self.grouped_up(self.up_bn(self.up(x))))
        x = self.late(torch.relu(x)).mean((2, 3))
        return self.fc_bn(self.fc(x))


def test_batch_norm_is_folded_into_every_kind_of_layer(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Norms()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.eval()
    wanted = model.double()(images.double())
    model.float()
    result = run_passes(traced(model, images), [Canonicalize(), FoldBatchNorm()])
    assert calls(result.graph_module).count("late") == 1
    assert not any("bn" in name for name in calls(result.graph_module))
    got = result.graph_module(images).double()
    assert (got - wanted).abs().max() / wanted.abs().max() < 1e-5
    (note,) = result.log[-1].notes
    assert "late" in note.node
    assert "relu" in note.reason


def test_folding_refuses_a_graph_in_training_mode(images: Tensor) -> None:
    graph_module = traced(Norms(), images).train()
    with pytest.raises(PassError, match=r"fold_batch_norm: .*eval"):
        run_passes(graph_module, [FoldBatchNorm()])
