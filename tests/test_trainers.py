"""The trainers of docs/trainers.md train a student that is exported as it was trained; CI lacks their packages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

PAGE = (Path(__file__).parent.parent / "docs" / "trainers.md").read_text("utf-8")
FIRST, LAST, LIGHTNING, ACCELERATE, TRANSFORMERS = re.findall(
    r"^```python\n(.*?)^```", PAGE, re.S | re.M
)


def trained(names: dict[str, Any], *parts: str) -> list[str]:
    """The parameters that the examples changed, of those that the student had before."""
    before: dict[str, torch.Tensor] = {}
    for part in (FIRST, *parts, LAST):
        exec(compile(part, "trainers.md", "exec", dont_inherit=True), names)
        if part is FIRST:
            student = names["program"].student
            before |= {name: x.detach().clone() for name, x in student.named_parameters()}
    after = dict(names["program"].student.named_parameters())
    assert names["checked"].samples > 0
    return [name for name, value in before.items() if not value.equal(after[name].cpu())]


def assert_both_layers_learned(changed: list[str]) -> None:
    assert {"0.weight_folded", "4.weight"} <= set(changed)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def network() -> dict[str, Any]:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    return {"net": net.eval(), "images": torch.randn(32, 1, 8, 8)}


def test_lightning(network: dict[str, Any]) -> None:
    pytest.importorskip("lightning")
    assert_both_layers_learned(trained(network, LIGHTNING))


def test_accelerate(network: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    assert_both_layers_learned(trained(network, ACCELERATE))


def test_the_trainer_of_transformers() -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    net = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(16, 3, 16, 16)
    samples = [{"pixel_values": image} for image in images]
    changed = trained({"net": net, "images": images, "samples": samples}, TRANSFORMERS)
    assert any("attention" in name for name in changed)
