"""`--explain` knows every name of an exported file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.cli.explain import explain
from sqakd_fx.cli.file_names import layers_of_names
from sqakd_fx.errors import RecipeError, StorageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.end = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = torch.relu(x + self.two(x))
        return self.end(x.mean((2, 3)).reshape(x.shape[0], -1)).softmax(1)


def test_every_name_of_a_file_is_explained(tmp_path: Path) -> None:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    program = sqakd_fx.build_program(Net(), images[:2], "w4a4")
    sqakd_fx.calibrate(program, images)
    lowered = sqakd_fx.lower(program.student).graph_module
    path = sqakd_fx.export(program, lowered, tmp_path / "model.onnx").path
    known, graph = layers_of_names(path), onnx.load(str(path)).graph
    names = [node.name for node in graph.node]
    names += [name for node in graph.node for name in node.output]
    names += [one.name for one in (*graph.initializer, *graph.input)]
    for name in names:
        assert explain(program, name, known), name
    inner = next(node for node in graph.node if node.name == "two/Conv")
    assert explain(program, inner.output[0], known)[0]["node"] == "two"
    with pytest.raises(RecipeError, match="no node or module 'nowhere'"):
        explain(program, "nowhere", known)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(StorageError, match=r"model\.onnx cannot be read"):
        layers_of_names(path)
