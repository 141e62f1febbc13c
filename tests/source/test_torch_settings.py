"""What a script for inference sets in torch does not reach the training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx import quantize
from sqakd_fx.engine.torch_settings import plain_settings
from sqakd_fx.source.source import load_source

MODEL_FILE = """
import torch
from torch import nn
{setting}
def model():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
def example_inputs():
    return torch.randn(2, 6)
def train_data():
    return [torch.randn(8, 6) for _ in range(24)]
"""
SETTINGS = [
    "torch.set_grad_enabled(False)",
    "torch.set_default_dtype(torch.float64)",
    "torch.set_default_device('cpu')",
]


@pytest.fixture(autouse=True)
def _settings_of_before() -> Iterator[None]:
    with plain_settings():
        yield


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_file_leaves_the_settings_of_torch_as_they_were(
    setting: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.py"
    path.write_text(MODEL_FILE.format(setting=setting), encoding="utf-8")
    load_source(str(path))
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def _data() -> list[Tensor]:
    return [torch.randn(8, 6) for _ in range(24)]


RECIPE = {"weight_bits": 8, "activation_bits": 8, "steps": 2, "compile": "never"}


def test_a_program_without_gradients_and_in_float64_can_train(tmp_path: Path) -> None:
    net, data, example = _net(), _data(), torch.randn(2, 6)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    result = quantize(net, data, example_inputs=example, recipe=RECIPE, out=tmp_path / "out")
    assert result is not None
    assert not torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float64


def test_weights_and_data_of_inference_mode_can_be_trained(tmp_path: Path) -> None:
    with torch.inference_mode():
        net, data, example = _net(), _data(), torch.randn(2, 6)
    result = quantize(net, data, example_inputs=example, recipe=RECIPE, out=tmp_path / "out")
    assert result is not None


def test_a_model_file_of_inference_mode_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    text = MODEL_FILE.format(setting="").replace("def model", "@torch.inference_mode()\ndef model")
    path.write_text(text, encoding="utf-8")
    assert load_source(str(path)).train_data is not None
