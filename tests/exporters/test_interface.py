"""What a deployer meets of a file: names, the batch axis and descriptions of inputs and outputs, in every profile."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.exporters.profiles import Export, write_profile
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import export_job

PROFILES = ("container", "packed", "typed", "qonnx", "float")
ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Inputs that never meet: torch's exporter has a symbol for each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        boxes = self.left(x).reshape(-1, 2, 2)
        scores = self.right(y).softmax(1)
        doubled = torch.cat([scores, scores])
        best = scores.argmax(1)
        return boxes, scores, doubled, best


class Pooled(nn.Module):
    """A Reshape between the batch axis of the input and that of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.conv(x).relu(), 1)
        return self.fc(pooled.flatten(1))  # type: ignore[no-any-return]


class Given(nn.Module):
    """An output twice, and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        return {"y": y, "again": y, "x": x}


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(1, 6))  # type: ignore[no-any-return]


def _job(model: nn.Module, *inputs: Tensor) -> tuple[Program, Export]:
    torch.manual_seed(0)
    program = build_program(model, inputs, "w4a4")
    calibrate(program.student, [program.example], method="minmax")
    return program, export_job(lower(program.student).graph_module, program)


def _sizes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_the_models_names_one_batch_and_descriptions(
    profile: str, tmp_path: Path
) -> None:
    _, job = _job(Pair(), ROWS, ROWS * 2)
    file = onnx.load(write_profile(profile, job, tmp_path / "model.onnx").path)
    graph = file.graph
    assert {v.name: _sizes(v) for v in graph.input} == {"x": ["batch", 6], "y": ["batch", 6]}
    assert {v.name: _sizes(v) for v in graph.output} == {
        "boxes": ["batch", 2, 2],
        "scores": ["batch", 3],
        "doubled": ["2*batch", 3],
        "best": ["batch"],
    }
    assert graph.input[0].doc_string.startswith("argument x of Pair, from -")
    assert [v.doc_string for v in graph.output][1:] == [
        "probabilities of classes on axis 1",
        "probabilities of classes on axis 1",
        "not a floating-point output",
    ]
    assert (file.producer_name, file.producer_version) == ("sqakd-fx", version("sqakd-fx"))
    assert graph.doc_string == "Pair"


@pytest.mark.parametrize("profile", PROFILES)
def test_a_batch_that_passes_a_reshape_is_the_same_batch(profile: str, tmp_path: Path) -> None:
    _, job = _job(Pooled(), torch.randn(2, 3, 6, 6))
    graph = onnx.load(write_profile(profile, job, tmp_path / "model.onnx").path).graph
    assert _sizes(graph.input[0]) == ["batch", 3, 6, 6]
    assert _sizes(graph.output[0]) == ["batch", 5]


@pytest.mark.parametrize("profile", ["container", "qonnx"])
def test_an_output_twice_and_an_input_given_back_have_names_of_their_own(
    profile: str, tmp_path: Path
) -> None:
    program, job = _job(Given(), ROWS)
    path = write_profile(profile, job, tmp_path / "model.onnx").path
    assert [v.name for v in onnx.load(path).graph.output] == ["y", "again", "x_1"]
    assert [one.name for one in program.outputs] == ["y", "again", "x_1"]
    if profile == "container":
        y, again, _ = ort.InferenceSession(path).run(None, {"x": ROWS.numpy()})
        assert np.array_equal(y, again)


def test_a_batch_size_that_the_model_demands_is_fixed_and_said(tmp_path: Path) -> None:
    _, job = _job(One(), ROWS[:1])
    graph = onnx.load(write_profile("container", job, tmp_path / "model.onnx").path).graph
    assert (_sizes(graph.input[0]), _sizes(graph.output[0])) == ([1, 6], [1, 4])
    assert graph.input[0].doc_string.endswith("the example's batch size only")
