"""A BatchNorm of weights alone is a constant; one of what the inputs give depends on the other samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_jobs import job_of
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.errors import TraceError
from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.frontend.trace import trace
from sqakd_fx.validation.validate import validate

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Standardized(nn.Conv2d):
    """A convolution that standardizes its weights, as Qiao et al. (arXiv 1903.10520) and networks of timm do."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class StandardizedInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def test_standardized_weights_are_quantized_like_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Standardized(3, 8, 3), nn.ReLU(), Standardized(8, 8, 3), nn.Flatten(1), nn.Linear(512, 5)
    )
    program, job = job_of(model.eval(), IMAGES, "w8a8")
    path = write_profile("container", job, tmp_path / "model.onnx").path
    checked = validate(program.student, job.lowered, path, [(IMAGES,)])
    assert checked.failures == ()
    assert checked.fusion.integer["QLinearConv"] == 2


def test_a_batch_norm_of_the_batch_is_refused_still() -> None:
    with pytest.raises(TraceError, match="would depend on the other samples"):
        trace(StandardizedInput(), IMAGES)
