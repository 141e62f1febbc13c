"""Two detectors in the form of torchvision's: a list of images in, boxes with scores out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Images:
    """Images of unlike sizes in one tensor."""

    tensors: Tensor
    image_sizes: list[tuple[int, int]]


class Transform(nn.Module):
    """Normalizes images and pads them to the largest of the list."""

    def forward(self, images: list[Tensor], targets: None = None) -> tuple[Images, None]:
        sizes = [(int(x.shape[1]), int(x.shape[2])) for x in images]
        return Images(self.batch_images([(x - 0.5) / 0.3 for x in images]), sizes), targets

    def batch_images(self, images: list[Tensor], size_divisible: int = 4) -> Tensor:
        high, wide = (max(x.shape[axis] for x in images) for axis in (1, 2))
        high, wide = (-(-size // size_divisible) * size_divisible for size in (high, wide))
        batch = images[0].new_zeros(len(images), 3, high, wide)
        for place, x in zip(batch, images):
            place[:, : x.shape[1], : x.shape[2]] = x
        return batch


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.one(x)
        return {"0": x, "1": self.two(x)}


class Head(nn.Module):
    """Scores and boxes of one anchor at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        layers = {"scores": self.scores, "boxes": self.boxes}
        return {
            name: torch.cat([layer(x).flatten(2).transpose(1, 2) for x in maps], 1)
            for name, layer in layers.items()
        }


def _best(scores: Tensor, boxes: Tensor, anchors: Tensor) -> list[dict[str, Tensor]]:
    best = scores.softmax(-1).amax(-1).topk(3).indices
    return [{"boxes": (b + anchors)[i], "scores": s[i]} for s, b, i in zip(scores, boxes, best)]


class OneStage(nn.Module):
    """As a RetinaNet: anchors come from the shapes of feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.backbone, self.head = Transform(), Backbone(), Head()

    def forward(self, images: list[Tensor], targets: None = None) -> list[dict[str, Tensor]]:
        batch, _ = self.transform(images, targets)
        maps = list(self.backbone(batch.tensors).values())
        outputs = self.head(maps)
        anchors = torch.cat([torch.arange(float(x[0, 0].numel())) for x in maps])[:, None]
        return _best(outputs["scores"], outputs["boxes"], anchors)


class FirstHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.scores(x) for x in maps], [self.boxes(x) for x in maps]


class FirstStage(nn.Module):
    """Chooses places in the first map that have a positive score, none where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.head = FirstHead()

    def forward(self, images: Images, maps: dict[str, Tensor], targets: None) -> list[Tensor]:
        scores, boxes = self.head(list(maps.values()))
        chosen = [s.flatten().topk(4) for s in scores[0]]
        return [c.indices[c.values > 0] + 0 * len(boxes) for c in chosen]


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.box_head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 9, 12), nn.ReLU())
        self.box_predictor = nn.Linear(12, 5)
        self.mask_head: nn.Module | None = None

    def forward(self, maps: dict[str, Tensor], places: list[Tensor], sizes: Any) -> list[Tensor]:
        around = nn.functional.unfold(maps["0"], 3, padding=1)
        regions = [x[:, at].T.reshape(-1, 8, 3, 3) for x, at in zip(around, places)]
        predicted = self.box_predictor(self.box_head(torch.cat(regions)))
        return list(predicted.split([len(at) for at in places]))


class TwoStages(nn.Module):
    """As a Faster R-CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.backbone = Transform(), Backbone()
        self.rpn, self.roi_heads = FirstStage(), Regions()

    def forward(self, images: list[Tensor], targets: None = None) -> list[Tensor]:
        batch, _ = self.transform(images, targets)
        maps = self.backbone(batch.tensors)
        places = self.rpn(batch, maps, targets)
        return self.roi_heads(maps, places, batch.image_sizes)  # type: ignore[no-any-return]
