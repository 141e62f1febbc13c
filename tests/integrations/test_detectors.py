"""A detector's backbone and heads are quantized, and the detector around them stays what it is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from small_detectors import OneStage, TwoStages
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.errors import SourceError, TraceError
from sqakd_fx.integrations import detectors
from sqakd_fx.source.source import load_source

IMAGES = [torch.rand(3, 16, 12), torch.rand(3, 10, 16)]


def outputs_of(detector: nn.Module, images: list[Tensor] = IMAGES) -> list[Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(detector(images))


@pytest.mark.parametrize("make", [OneStage, TwoStages])
def test_parts_compute_what_the_detector_does(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    whole = make().eval()
    again = detectors.with_parts(whole, detectors.parts(whole))
    torch.testing.assert_close(outputs_of(again), outputs_of(whole))


def test_the_detector_itself_is_not_changed() -> None:
    whole = TwoStages().eval()
    before = dict(whole.named_modules())
    detectors.with_parts(whole, detectors.parts(whole))
    assert dict(whole.named_modules()) == before


def test_parts_are_given_what_the_detector_gives_them() -> None:
    torch.manual_seed(0)
    received = detectors.part_inputs(TwoStages().eval(), IMAGES)
    assert [tuple(x.shape) for x in received["proposals"]] == [(1, 3, 16, 12), (1, 3, 12, 16)]
    assert all(x.shape[1:] == (8, 3, 3) for x in received["regions"])


def test_without_regions_the_second_stage_does_not_run() -> None:
    whole = TwoStages().eval()
    nn.init.constant_(whole.rpn.head.scores.bias, -1e3)  # type: ignore[union-attr, arg-type]

    def refused(x: Tensor) -> Any:
        raise AssertionError("called without a region")

    found = outputs_of(detectors.with_parts(whole, {"regions": refused}))
    assert [tuple(x.shape) for x in found] == [(0, 5), (0, 5)]


@pytest.mark.parametrize("make", [OneStage, TwoStages])
def test_a_detector_runs_on_the_files_of_its_parts(make: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = detectors.with_size(make().eval(), 16, 16)
    received = detectors.part_inputs(detector, [torch.rand(3, 16, 16) for _ in range(6)])
    runs = {}
    for name, part in detectors.parts(detector).items():
        data = received[name]
        program = sqakd_fx.build_program(part, (data[0],), "w8a8")
        sqakd_fx.calibrate(program, data)
        lowered = sqakd_fx.lower(program.student).graph_module
        sqakd_fx.export(program, lowered, tmp_path / f"{name}.onnx")
        assert not [n for n in program.notes if "stays in float" in n.reason]
        runs[name] = detectors.onnx_file(tmp_path / f"{name}.onnx")
    wanted = outputs_of(detector)
    got = outputs_of(detectors.with_parts(detector, runs))
    assert [x.shape[1:] for x in got] == [x.shape[1:] for x in wanted]
    last = {name: detectors.parts(detector)[name](received[name][0]) for name in runs}
    for name, run in runs.items():
        flat = torch.utils._pytree.tree_leaves(last[name])
        for a, b in zip(run(received[name][0]), flat, strict=True):
            assert (a - b).norm() < 0.1 * b.norm()


def test_images_are_padded_to_one_size_or_refused() -> None:
    detector = detectors.with_size(OneStage().eval(), 24, 16)
    (x,) = detectors.part_inputs(detector, IMAGES[:1])["network"]
    assert x.shape == (1, 3, 24, 16)
    assert not x[..., 16:, :].any()
    with pytest.raises(SourceError, match=r"an image is 16×30 .* size asked for is 24×16: lower"):
        detector([torch.rand(3, 16, 30)])


def test_what_runs_in_a_parts_place_gives_as_many_tensors() -> None:
    whole = OneStage().eval()
    with pytest.raises(SourceError, match=r"gives 2 tensors, .* gives 1: give each part the file"):
        detectors.with_parts(whole, {"network": lambda x: [x]})(IMAGES)
    with pytest.raises(SourceError, match="no part 'heads': its parts are network"):
        detectors.with_parts(whole, {"heads": lambda x: x})


def test_a_whole_detector_is_refused_with_the_way_out() -> None:
    sentence = r"OneStage is a whole detector.*sqakd_fx.integrations.detectors.parts\(model\)"
    with pytest.raises(TraceError, match=sentence):
        sqakd_fx.build_program(OneStage(), (IMAGES,), "w8a8")
    module = ModuleType("made")
    module.model = OneStage  # type: ignore[attr-defined]
    module.example_inputs = lambda: (IMAGES,)  # type: ignore[attr-defined]
    with pytest.raises(TraceError, match=sentence), patch.dict(sys.modules, made=module):
        load_source("made:model")


class Around(nn.Module):
    """A detector inside a model."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = OneStage()

    def forward(self, image: Tensor) -> Tensor:
        (found,) = self.detector([image[0]])
        if found["scores"].sum() > 0:
            return found["boxes"]  # type: ignore[no-any-return]
        return -found["boxes"]  # type: ignore[no-any-return]


class Backbones(Around):
    """Uses a part of its detector."""

    def forward(self, image: Tensor) -> Tensor:
        return self.detector.backbone(image)["1"]  # type: ignore[no-any-return]


def test_a_detector_inside_a_model_is_named_where_it_stands_in_the_way() -> None:
    image = torch.rand(1, 3, 16, 16)
    with pytest.raises(TraceError, match=r"whole detector at 'detector'.*give its backbone"):
        sqakd_fx.trace(Around(), image)
    sqakd_fx.trace(Backbones(), image)


def test_what_is_no_detector_has_no_parts() -> None:
    assert not detectors.is_detector(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(SourceError, match="has not the form of torchvision's detectors"):
        detectors.parts(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"]
)
def test_torchvisions_own_detectors_have_this_form(name: str) -> None:
    models = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    whole = getattr(models, name)(weights=None, weights_backbone=None, num_classes=3).eval()
    again = detectors.with_parts(whole, detectors.parts(whole))
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 60)]
    torch.testing.assert_close(outputs_of(again, images), outputs_of(whole, images))
