"""Images of bytes as inputs: the file computes what a loader of images computes, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.errors import RecipeError
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import check_export, export
from sqakd_fx.runtime.preprocessing import bytes_of, floats_of
from sqakd_fx.runtime.session import session
from sqakd_fx.source.transform import named_transform
from sqakd_fx.validation.validate import validate

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
IMAGES = torch.arange(3 * 3 * 8 * 12).reshape(3, 3, 8, 12).mul(7).remainder(256).to(torch.uint8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(image)))  # type: ignore[no-any-return]


def loaded(images: Tensor) -> Tensor:
    """As `--data DIR --transform imagenet` gives images to the model."""
    pixels = torch.from_numpy(images.numpy().astype(np.float32) / 255)
    return torch.stack([named_transform("imagenet").normalized(x) for x in pixels])


def calibrated(**recipe: Any) -> Program:
    torch.manual_seed(0)
    program = build_program(Net().eval(), loaded(IMAGES), {"preset": "w8a8", **recipe})
    calibrate(program.student, [program.example], method="minmax")
    return program


def codes_of_input(path: Path, images: np.ndarray) -> np.ndarray:
    """What the first QuantizeLinear of a file gives, in a session with full optimization."""
    proto = onnx.load(path)
    first = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")
    proto.graph.output.append(onnx.helper.make_tensor_value_info(first.output[0], 2, None))
    running = session(proto.SerializeToString())
    return running.run([first.output[0]], {"image": images})[0]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_codes_of_the_input_are_those_of_the_unfused_file(layout: str, tmp_path: Path) -> None:
    plain, fused = calibrated(), calibrated(preprocess={"image": {**IMAGENET, "layout": layout}})
    paths = [
        export(one, lower(one.student).graph_module, tmp_path / f"{number}.onnx").path
        for number, one in enumerate((plain, fused))
    ]
    given = IMAGES.permute(0, 2, 3, 1).contiguous() if layout == "nhwc" else IMAGES
    wanted = codes_of_input(paths[0], loaded(IMAGES).numpy())
    assert np.array_equal(codes_of_input(paths[1], given.numpy()), wanted)
    assert len(np.unique(wanted)) > 100
    (image,) = onnx.load(paths[1]).graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sizes = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert sizes == (["batch", 8, 12, 3] if layout == "nhwc" else ["batch", 3, 8, 12])
    assert "the file computes (x / 255 - (0.485, 0.456, 0.406)) / (0.229" in image.doc_string


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_file_with_preprocessing_is_validated_code_by_code(target: str, tmp_path: Path) -> None:
    program = calibrated(preprocess={"*": {**IMAGENET, "layout": "nhwc"}}, target=target)
    lowered = lower(program.student).graph_module
    path = export(program, lowered, tmp_path / "model.onnx").path
    checked = validate(program.student, lowered, path, [program.example])
    assert checked.failures == ()
    assert max(t.largest for t in checked.deployed.tensors) == 0
    broken = onnx.load(path)
    (std,) = [i for i in broken.graph.initializer if i.name == "image_std"]
    std.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(std) * np.float32(1.001), std.name))
    onnx.save(broken, path)
    (said,) = validate(program.student, lowered, path, [program.example]).failures
    assert said.startswith("image: the preprocessing in the file gives other numbers than")


def test_every_byte_comes_back() -> None:
    for how in (resolve_recipe("w8a8", preprocess={"x": IMAGENET}).preprocess["x"],):
        assert torch.equal(bytes_of(floats_of(IMAGES, how), how), IMAGES)
        assert torch.equal(floats_of(IMAGES, how), loaded(IMAGES))


@pytest.mark.parametrize(
    ("preprocess", "said"),
    [
        ({"picture": {}}, "an input 'picture' that the model has not: did you mean|choose image"),
        ({"image": {"mean": [0.1, 0.2]}}, "2 numbers of mean for 'image', which has 3 channels"),
    ],
)
def test_what_does_not_fit_is_told_before_training(preprocess: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_export(calibrated(preprocess=preprocess))


def test_a_result_takes_images_of_bytes_of_free_sizes(tmp_path: Path) -> None:
    recipe = resolve_recipe(
        "w8a8",
        preprocess={"image": {**IMAGENET, "layout": "nhwc"}},
        dynamic={"image": {"height": 2, "width": 3}},
        steps=0,
    )
    data = loaded(IMAGES)
    result = sqakd_fx.quantize(
        Net(), data, example_inputs=data[:2], recipe=recipe, out=tmp_path, progress=False
    )
    assert result is not None
    assert result.validation.failures == ()
    y = result.predict(np.zeros((1, 10, 20, 3), np.uint8))
    assert isinstance(y, Tensor)
    assert y.shape == (1, 2, 8, 18)
    script = (tmp_path / "deploy.py").read_text()
    assert "'image': random.integers(0, 255, (batch, height, width, 3), \"uint8\"" in script
