"""A graph is translated to ONNX once, whatever numbers it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_jobs import job_of
from torch import Tensor, nn

from sqakd_fx.exporters.profiles import Export, write_profile
from sqakd_fx.exporters.translation import Translator
from sqakd_fx.program import lower
from sqakd_fx.results.export import export_job


class Mixed(nn.Module):
    """Integer layers, float modules, a table, a shared weight, and constants written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.group, self.table = nn.GroupNorm(2, 8), nn.Embedding(7, 8)
        self.fc, self.end = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.group(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        y = self.fc(self.fc(y + self.table(torch.tensor([3]))))
        return self.end(y) * torch.arange(8.0)


def jobs(images: Tensor, *, other_bits: bool = False) -> tuple[Export, Export]:
    """The job of a network, and that of the same network with other numbers, and bits."""
    torch.manual_seed(0)
    model = Mixed().eval()
    program, job = job_of(model, images, "w8a8")
    if other_bits:
        return job, job_of(model, images, "w4a4")[1]
    with torch.no_grad():
        for parameter in program.student.parameters():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
    return job, export_job(lower(program.student).graph_module, program)


@pytest.mark.parametrize("profile", ["container", "packed"])
def test_a_kept_translation_gives_the_bytes_of_a_new_one(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    first, second = jobs(images)
    write_profile(profile, first, tmp_path / "first.onnx")
    kept = replace(second, translator=first.translator)
    new = write_profile(profile, second, tmp_path / "new.onnx").path.read_bytes()
    with monkeypatch.context() as patched:
        patched.delattr(torch.export, "export")  # nothing is traced again
        again = write_profile(profile, kept, tmp_path / "again.onnx").path.read_bytes()
    assert again == new
    assert again != (tmp_path / "first.onnx").read_bytes()


def test_another_graph_is_translated_anew(images: Tensor, tmp_path: Path) -> None:
    first, second = jobs(images, other_bits=True)
    write_profile("container", first, tmp_path / "first.onnx")
    kept = replace(second, translator=first.translator)
    again = write_profile("container", kept, tmp_path / "again.onnx").path.read_bytes()
    new = replace(second, translator=Translator())
    assert again == write_profile("container", new, tmp_path / "new.onnx").path.read_bytes()
