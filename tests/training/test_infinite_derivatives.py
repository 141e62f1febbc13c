"""Roots of values that are exactly 0 do not end training: their infinite derivatives count as none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sqakd_fx

WAVES = torch.randn(96, 1, 64, generator=torch.Generator().manual_seed(0))
WAVES[::2, :, 20:] = 0  # silence, whose spectrum is exactly 0


class Spectrum(nn.Module):
    """Magnitudes of a transform by a convolution, and a classifier of them."""

    def __init__(self, root: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transform = nn.Conv1d(1, 16, 16, 8, bias=False)
        self.head = nn.Conv1d(8, 4, 3)
        self.root = root

    def forward(self, x: Tensor) -> Tensor:
        real, imaginary = self.transform(x).chunk(2, 1)
        return self.head(self.root(real * real + imaginary * imaginary)).mean(2)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "root",
    [torch.sqrt, Tensor.sqrt, lambda x: x**0.5, lambda x: x.pow(0.3)],
    ids=["function", "method", "operator", "power"],
)
def test_a_root_of_zero_does_not_end_training(
    root: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    recipe = {"preset": "w8a8", "steps": 8, "batch_size": 32, "first_last": "same"}
    program = sqakd_fx.build_program(Spectrum(root), WAVES[:2], recipe)
    sqakd_fx.calibrate(program, WAVES)
    before = {k: v.clone() for k, v in program.student.state_dict().items()}
    distilled = sqakd_fx.distil(program, WAVES)
    assert distilled.loss < 1
    after = program.student.state_dict()
    assert all(bool(x.isfinite().all()) for x in after.values() if x.is_floating_point())
    assert not all(torch.equal(before[k], after[k]) for k in before if "head" in k)
