"""deploy.py runs in an environment that holds numpy and onnxruntime alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.deploy_script import write_deploy_script
from sqakd_fx.results.export import export

NUMPY_AND_ONNXRUNTIME_ALONE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sqakd_fx", "onnx", "onnxscript", "onnx_ir"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
"""
"""A sitecustomize, which Python imports before a script."""


class Tokens(nn.Module):
    """A transformer of token numbers and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, keep: Tensor) -> dict[str, Tensor]:
        x = self.layer(self.table(ids)) * keep[:, :, None]
        return {"logits": self.head(x.mean(1)), "hidden": x}


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, 2, 1)
        self.boxes, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 5, 1)

    def forward(self, image: Tensor) -> Any:
        x = torch.relu(self.body(image))
        boxes = self.boxes(x).flatten(2).transpose(1, 2)
        scores = self.classes(x).flatten(2).transpose(1, 2).softmax(-1)
        labels = scores.argmax(-1)
        return boxes, scores, labels


class OneAtATime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(1, 4))  # type: ignore[no-any-return]


def _tokens() -> tuple[Any, ...]:
    return torch.randint(0, 20, (2, 6)), torch.ones(2, 6, dtype=torch.bool)


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds no torch."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NUMPY_AND_ONNXRUNTIME_ALONE)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True
    )
    assert b"torch is not installed here" in done.stderr
    return environment


def _deploy(model: nn.Module, example: tuple[Any, ...], folder: Path, **recipe: Any) -> Path:
    torch.manual_seed(0)
    program = build_program(model.eval(), example, {"preset": "w4a4", **recipe})
    calibrate(program.student, [program.example], method="minmax")
    exported = export(program, lower(program.student).graph_module, folder / "model.onnx")
    return write_deploy_script(program, exported.path)


def _printed(script: Path, environment: dict[str, str], *arguments: str) -> list[str]:
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_transformer_of_two_inputs_runs_at_any_batch_size(
    tmp_path: Path, alone: dict[str, str]
) -> None:
    script = _deploy(Tokens(), _tokens(), tmp_path)
    assert len(script.read_text().splitlines()) < 25
    for arguments, size in ((), 2), (("1",), 1), (("7",), 7):
        assert _printed(script, alone, *arguments) == [
            f"logits float32 ({size}, 3)",
            f"hidden float32 ({size}, 6, 8)",
        ]


def test_a_detector_runs_on_a_file_as_on_random_images(
    tmp_path: Path, alone: dict[str, str]
) -> None:
    script = _deploy(Detector(), (torch.randn(2, 3, 8, 8),), tmp_path)
    np.save(tmp_path / "images.npy", np.zeros((3, 3, 8, 8), np.float32))
    for argument in ("3", str(tmp_path / "images.npy")):
        assert _printed(script, alone, argument) == [
            "boxes float32 (3, 16, 4)",
            "scores float32 (3, 16, 5)",
            "labels int64 (3, 16)",
        ]


def test_a_transformer_runs_at_the_sizes_that_are_asked_for_and_at_those_of_a_file(
    tmp_path: Path, alone: dict[str, str]
) -> None:
    script = _deploy(Tokens(), _tokens(), tmp_path, dynamic={"*": {"length": 1}})
    assert "deploy.py [BATCH length=N | X.npy ...]" in script.read_text()
    np.save(tmp_path / "ids.npy", np.ones((2, 4), np.int64))
    for arguments, batch, length in (
        ((), 2, 6),
        (("3", "length=11"), 3, 11),
        ((str(tmp_path / "ids.npy"),), 2, 4),
    ):
        assert _printed(script, alone, *arguments) == [
            f"logits float32 ({batch}, 3)",
            f"hidden float32 ({batch}, {length}, 8)",
        ]


def test_a_detector_runs_on_images_of_several_sizes(tmp_path: Path, alone: dict[str, str]) -> None:
    dynamic = {"image": {"height": 2, "width": 3}}
    script = _deploy(Detector(), (torch.randn(2, 3, 8, 8),), tmp_path, dynamic=dynamic)
    assert len(script.read_text().splitlines()) < 27
    for height, width in ((8, 8), (16, 8), (6, 20)):
        said = _printed(script, alone, "1", f"height={height}", f"width={width}")
        assert said[0] == f"boxes float32 (1, {height * width // 4}, 4)"


def test_a_model_for_one_sample_has_no_choice_of_a_batch_size(
    tmp_path: Path, alone: dict[str, str]
) -> None:
    script = _deploy(OneAtATime(), (torch.zeros(1, 4),), tmp_path)
    assert "batch" not in script.read_text().lower()
    assert _printed(script, alone) == ["output float32 (1, 2)"]
