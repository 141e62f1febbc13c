"""What ONNX Runtime would rewrite into another function comes out of the exporter so that it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import with_lively_batch_norm
from export_jobs import job_of
from torch import Tensor, nn

from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.validation.validate import validate


class Between(nn.Module):
    """Layers before and behind `inner`, each with an activation of its own."""

    def __init__(self, make: Callable[[int, int], nn.Module], inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.behind = make(3, 8), inner, make(8, 8)
        self.head = make(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(torch.relu(self.before(x))))
        return self.head(torch.relu(self.behind(x)))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """A layer that reads its codes moved: in another order, and of every second pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(2, 3)[:, :, ::2])  # type: ignore[no-any-return]


def pixels(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1)


IMAGES, ROWS = torch.randn(8, 3, 12, 12), torch.randn(64, 3)
FLOAT_LAYERS = {
    "conv": (pixels, nn.Conv2d(8, 8, 3, padding=1), IMAGES),
    "without bias": (pixels, nn.Conv2d(8, 8, 3, bias=False), IMAGES),
    "normalized": (pixels, nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), IMAGES),
    "transposed": (pixels, nn.ConvTranspose2d(8, 8, 2, 2), IMAGES),
    "moved": (pixels, Patches(), IMAGES),
    "pooled": (pixels, nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)), IMAGES),
    "padded": (pixels, nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), IMAGES),
    "resized": (pixels, nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 1)), IMAGES),
    "linear": (nn.Linear, nn.Linear(8, 8), ROWS),
}


@pytest.mark.parametrize("profile", ["container", "packed"])
@pytest.mark.parametrize("name", FLOAT_LAYERS)
def test_a_float_layer_between_quantized_ones_keeps_its_weights(
    name: str, profile: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, inner, x = FLOAT_LAYERS[name]
    with_lively_batch_norm(inner, (1, 8, 12, 12)[: x.ndim])
    kept = 'override=[{match="inner*", float=true}]'
    program, job = job_of(Between(make, inner).eval(), x, "w4a4", "lsq", kept, "batch_norm=absorb")
    exported = write_profile(profile, job, tmp_path / "model.onnx")
    checked = validate(program.student, job.lowered, exported.path, [(x,)])
    assert checked.failures == ()
    (reason,) = checked.fusion.reasons.values()
    ends = ("its weight or a constant is float", "is float, made by Clip", "is float, made by Pad")
    assert reason.endswith(ends)
