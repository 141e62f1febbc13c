"""Axes that the recipe frees have any size in the file, and what has one size only is told before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sqakd_fx
from sqakd_fx.cli.arguments import dynamic_of
from sqakd_fx.errors import ExportError, RecipeError, TraceError
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.free_axes import free_axes
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import check_export, export
from sqakd_fx.results.other_sizes import calls_of_other_sizes
from sqakd_fx.source.inputs import calibration_batches, source_inputs
from sqakd_fx.source.source import Source
from sqakd_fx.validation.validate import validate

IMAGE = {"*": {"height": 2, "width": 3}}


class Segmenter(nn.Module):
    """Down and up again, a skip connection, a transposed convolution, an interpolation to the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = torch.relu(self.down(x))
        two = torch.cat([self.up(torch.relu(self.deep(one))), one], 1)
        logits = self.head(two)
        return {"logits": F.interpolate(logits, size=x.shape[2:]), "means": logits.mean((2, 3))}


class Tokens(nn.Module):
    """A causal transformer of token numbers and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.join, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        batch, length = ids.shape
        q, k, v = self.join(self.table(ids)).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x.transpose(1, 2).reshape(batch, length, 8) * keep[:, :, None]
        return self.head(x)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A convolution, and what a test puts behind it."""

    def __init__(self, behind: Any = None) -> None:
        super().__init__()
        self.conv, self.behind = nn.Conv2d(3, 4, 3, padding=1), behind

    def forward(self, x: Tensor) -> Any:
        return self.behind(torch.relu(self.conv(x)))


def calibrated(
    model: nn.Module, example: Any, dynamic: Any, bits: str = "w4a4", target: str = "onnxruntime"
) -> Program:
    torch.manual_seed(0)
    recipe = {"preset": bits, "dynamic": dynamic, "target": target}
    program = build_program(model.eval(), example, recipe)
    calibrate(program.student, [program.example], method="minmax")
    return program


NETWORKS: dict[str, tuple[type[nn.Module], tuple[Tensor, ...], Any]] = {
    "images": (Segmenter, (torch.randn(2, 3, 16, 24),), IMAGE),
    "one axis": (Segmenter, (torch.randn(2, 3, 16, 16),), {"x": {"width": 3}}),
    "sequences": (
        Tokens,
        (torch.randint(0, 20, (2, 6)), torch.ones(2, 6, dtype=torch.bool)),
        {"*": {"length": 1}},
    ),
}


@pytest.mark.parametrize(
    ("name", "target"),
    [*((name, "onnxruntime") for name in NETWORKS), ("images", "tensorrt")],
)
def test_the_file_is_the_student_at_three_sizes_code_by_code(
    name: str, target: str, tmp_path: Path
) -> None:
    make, example, dynamic = NETWORKS[name]
    program = calibrated(make(), example, dynamic, target=target)
    lowered = lower(program.student).graph_module
    path = export(program, lowered, tmp_path / "model.onnx", target=target).path
    calls = calls_of_other_sizes(program.student, program.example, program.free_axes)
    assert len({tuple(call[0].shape) for call in calls}) == 3
    checked = validate(program.student, lowered, path, calls)
    assert checked.failures == ()
    assert max(t.largest for t in checked.deployed.tensors) == 0
    given = onnx.load(path).graph.input
    names = {d.dim_param for v in given for d in v.type.tensor_type.shape.dim if d.dim_param}
    assert names == {"batch", *(called for axes in dynamic.values() for called in axes)}


def test_a_torch_export_program_has_free_sizes_too(tmp_path: Path) -> None:
    make, example, dynamic = NETWORKS["sequences"]
    program = calibrated(make(), example, dynamic)
    lowered = lower(program.student).graph_module
    path = export(program, lowered, tmp_path / "model.pt2", target="executorch").path
    import torch.ao.quantization.fx._decomposed

    made = torch.export.load(path).module()
    for call in calls_of_other_sizes(program.student, program.example, program.free_axes):
        torch.testing.assert_close(made(*call), lowered(*call), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        (
            lambda x: F.linear(x.flatten(1), torch.ones(2, 4 * 64)),
            "the model runs at the example's size only: at 2×3×16×16 it fails",
        ),
        (lambda x: F.adaptive_avg_pool2d(x, 2), "pools to 2 values whatever the size"),
        (lambda x: x * float(int(x.size(2))), "the graph holds for the example's size only"),
    ],
)
def test_a_model_of_one_size_is_told_so_before_training(behind: Any, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        calibrated(Layer(behind), torch.randn(2, 3, 8, 8), IMAGE)


def test_a_file_that_is_wrong_at_other_sizes_is_told_before_training() -> None:
    """The overhang of the last window is that of the example: none at 9, one column at 18."""

    pool = nn.Sequential(nn.AvgPool2d(3, 2, ceil_mode=True), nn.Conv2d(4, 2, 1))
    program = calibrated(Layer(pool), torch.randn(2, 3, 9, 9), IMAGE, "w8a8")
    with pytest.raises(ExportError, match=r"dynamic.*the file is wrong at 3×18×18"):
        check_export(program)


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ({"y": {"height": 2}}, "an input 'y' that the model has not"),
        ({"x": {"depth": 4}}, "frees axis 4 of 'x' .depth., which has 4 axes"),
        ({"x": {"row": 3}}, "the example has 1: give example_inputs"),
        ({"x": {"size": 1}, "z": {"size": 1}}, "give each size a name of its own"),
    ],
)
def test_axes_that_are_not_there_are_told(dynamic: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        free_axes(dynamic, {"x": (2, 3, 8, 1), "z": (2, 5)})


@pytest.mark.parametrize("axes", [{"height": 0}, {"batch": 2}, {"an axis": 2}])
def test_an_axis_has_a_name_of_its_own_and_is_not_the_batch(axes: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="dynamic"):
        resolve_recipe("w8a8", dynamic={"x": axes})


def test_the_option_is_the_recipes_key() -> None:
    said = dynamic_of(["height=2,width=3", "ids:length=1"])
    assert said == {"dynamic": {"*": {"height": 2, "width": 3}, "ids": {"length": 1}}}
    assert dynamic_of(None) == {}
    with pytest.raises(RecipeError, match="--dynamic takes height=2,width=3"):
        dynamic_of(["height"])


def test_data_of_free_sizes_fit_the_file() -> None:
    tall, square = torch.rand(4, 3, 24, 16), torch.rand(4, 3, 16, 16)
    wide = torch.rand(4, 3, 16, 32)
    data = [tall, square, wide]
    source = Source("model.py", "model", Segmenter().eval(), (square,), {}, data, None, None)
    recipe = {"preset": "w8a8", "dynamic": {"x": {"height": 2}}}
    program = build_program(source.model, square, recipe)
    inputs = source_inputs(source, program)
    assert len(list(calibration_batches(inputs, torch.device("cpu")))) == 3
    said = inputs.sizes.sentence()
    assert said is not None
    assert "'x' of 3×16×32 beside the example's 3×height×16" in said


def test_a_result_holds_its_free_sizes(tmp_path: Path) -> None:
    data = torch.randn(8, 3, 16, 16)
    recipe = resolve_recipe("w8a8", dynamic=IMAGE, steps=1)
    model = Segmenter()
    result = sqakd_fx.quantize(
        model, data, example_inputs=data[:2], recipe=recipe, out=tmp_path, progress=False
    )
    assert result is not None
    assert result.validation.failures == ()
    assert result.validation.sizes == ("3×32×32", "3×24×32", "3×8×8")
    assert "at inputs of 3×32×32, 3×24×32, 3×8×8" in (tmp_path / "report.md").read_text()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    got = session.run(None, {"x": np.zeros((1, 3, 40, 16), np.float32)})
    assert [y.shape for y in got] == [(1, 2, 40, 16), (1, 2)]
    from sqakd_fx.cli.validate import validate_saved, validate_with_source

    path = tmp_path / "model.onnx"
    again = validate_saved(tmp_path, path, None, "onnxruntime")
    assert (again.failures, again.sizes) == ((), result.validation.sizes)
    source = Source("segmenter", "segmenter", model, (data[:2],), {}, [data], None, None)
    again = validate_with_source(tmp_path, path, source, "onnxruntime")
    assert (again.failures, again.sizes) == ((), result.validation.sizes)
