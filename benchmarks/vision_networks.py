"""torchvision's segmentation networks whole, and of its detectors what computes: backbone and heads.

A detector's own forward takes a list of images of any size and chooses boxes in Python: that stays outside the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class OneStage(nn.Module):
    """Backbone and head of a RetinaNet, an SSD or an FCOS: scores and boxes of all anchors."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.head(list(self.backbone(images).values()))
        return outputs


class Proposals(nn.Module):
    """Backbone and first stage of a Faster R-CNN: feature maps, scores and boxes of all anchors."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.rpn.head

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        features = self.backbone(images)
        scores, boxes = self.head(list(features.values()))
        return features, scores, boxes


class Regions(nn.Module):
    """Second stage of a Faster R-CNN: classes and boxes of regions that were cut out of the feature maps."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.head, self.predictor = detector.roi_heads.box_head, detector.roi_heads.box_predictor

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = self.predictor(self.head(regions))
        return outputs


def _made(family: str, name: str) -> Any:
    import torchvision

    make = getattr(getattr(torchvision.models, family), name)
    return make(num_classes=5, weights=None, weights_backbone=None)


def _segmentation(name: str) -> Callable[[], Built]:
    return lambda: (_made("segmentation", name), (torch.randn(2, 3, 64, 64),), {})


def _detection(part: Callable[[Any], nn.Module], name: str, *shape: int) -> Callable[[], Built]:
    return lambda: (part(_made("detection", name)), (torch.rand(2, *shape),), {})


VISION: dict[str, Callable[[], Built]] = {
    "torchvision/lraspp": _segmentation("lraspp_mobilenet_v3_large"),
    "torchvision/deeplabv3": _segmentation("deeplabv3_mobilenet_v3_large"),
    "torchvision/fcn": _segmentation("fcn_resnet50"),
    "torchvision/retinanet, backbone and heads": _detection(
        OneStage, "retinanet_resnet50_fpn", 3, 64, 64
    ),
    "torchvision/ssdlite, backbone and heads": _detection(
        OneStage, "ssdlite320_mobilenet_v3_large", 3, 320, 320
    ),
    "torchvision/faster_rcnn, first stage": _detection(
        Proposals, "fasterrcnn_mobilenet_v3_large_320_fpn", 3, 64, 64
    ),
    "torchvision/faster_rcnn, second stage": _detection(
        Regions, "fasterrcnn_mobilenet_v3_large_320_fpn", 256, 7, 7
    ),
}
"""Name to model and example call."""
