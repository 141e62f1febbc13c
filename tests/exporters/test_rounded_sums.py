"""Where a sum reads a convolution's codes, the rounding between the two is kept by every runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import with_lively_batch_norm
from export_jobs import job_of
from torch import Tensor, nn

from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.runtime.openvino import OpenVinoModel
from sqakd_fx.runtime.session import session

IMAGES = torch.randn(8, 3, 16, 16)


class Shortcuts(nn.Module):
    """Three sums: with a convolution's shortcut, with the input's, and of a layer that two others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.first, self.beside = (
            nn.Sequential(nn.Conv2d(i, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
            for i in (3, 8, 8)
        )
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(x))
        x = torch.relu(self.first(x) + self.beside(x))
        x = torch.relu(self.second(x) + x)
        read_twice = self.third(x)
        x = torch.relu(read_twice + x) + torch.sigmoid(read_twice)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def _written(folder: Path, bits: str, profile: str) -> Path:
    torch.manual_seed(0)
    model = with_lively_batch_norm(Shortcuts(), IMAGES.shape)
    path = folder / "model.onnx"
    write_profile(profile, job_of(model, IMAGES, bits)[1], path)
    return path


def _repeated(graph: onnx.GraphProto) -> list[str]:
    """The quantizers whose codes another quantizer gives again."""
    made = {output: node for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        floats = made.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if floats is not None and floats.op_type == "DequantizeLinear":
            same = floats.input[1] == node.input[1]
            found += [floats.input[0]] if same else []
    return found


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_codes_that_a_sum_alone_reads_are_quantized_again(bits: str, tmp_path: Path) -> None:
    graph = onnx.load(_written(tmp_path, bits, "container")).graph
    assert _repeated(graph) == ["first.0_quantized", "beside.0_quantized", "second_quantized"]


@pytest.mark.parametrize("profile", ["container", "packed", "typed"])
def test_the_runtime_removes_the_second_pair(profile: str, tmp_path: Path) -> None:
    path = _written(tmp_path, "w8a8", profile)
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert len(_repeated(onnx.load(path).graph)) == 3
    assert _repeated(graph) == []
    fused = [node for node in graph.node if node.op_type == "QLinearConv"]
    assert len(fused) == 5


def test_the_second_pair_changes_no_number(tmp_path: Path) -> None:
    path = _written(tmp_path, "w8a8", "container")
    model = onnx.load(path)
    names = _repeated(model.graph)
    pairs = [(name, f"{name}/again") for name in names]
    shape = onnx.TensorProto.UINT8, None
    for name in [name for pair in pairs for name in pair]:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, *shape))
    running = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for once, again in pairs:
        one, other = running.run([once, again], {model.graph.input[0].name: IMAGES.numpy()})
        assert np.array_equal(one, other)
        assert len(np.unique(one)) > 50


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="pip install 'sqakd-fx[openvino]'"
)
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_openvino_rounds_what_a_sum_reads(bits: str, tmp_path: Path) -> None:
    path = _written(tmp_path, bits, "container")
    name = onnx.load(path).graph.input[0].name
    feeds = {name: torch.randn(64, 3, 16, 16).numpy()}
    (wanted,) = session(path).run(None, feeds)
    (made,) = OpenVinoModel(path, low_precision=True)(None, feeds)
    assert np.linalg.norm(made - wanted) < 2e-3 * np.linalg.norm(wanted)
