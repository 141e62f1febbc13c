"""Where text stands: PP-OCRv4's detector, a MobileNetV3 with a feature pyramid; from an ONNX file."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
import torch
from inputs import DOCSTRINGS, PHOTOGRAPHS, batches, crops, docstrings, package_file, pixels
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

FAMILY = "segmentation, from ONNX"
WEIGHTS = ("rapidocr-onnxruntime==1.4.4", "onnx2torch==1.5.15")
LIBRARIES = ("torchvision", "scikit-image", "scikit-learn")
INPUTS = f"{DOCSTRINGS}, drawn over {PHOTOGRAPHS}"
SCORE = "lines of text found, harmonic mean of precision and recall (%)"
SIZE, LINES = 320, 6


def model() -> nn.Module:
    from onnx2torch import convert

    path = package_file("rapidocr_onnxruntime", "models", "ch_PP-OCRv4_det_infer.onnx")
    return convert(with_initializers(onnx.load(path))).eval()  # type: ignore[no-any-return]


def with_initializers(file: onnx.ModelProto) -> onnx.ModelProto:
    """The file with its Constant nodes as initializers: onnx2torch looks for weights there alone."""
    for node in [one for one in file.graph.node if one.op_type == "Constant"]:
        (value,) = (one.t for one in node.attribute if one.name == "value")
        value.name = node.output[0]
        file.graph.initializer.append(value)
        file.graph.node.remove(node)
    return file


def pages(count: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """Photographs with lines of text in many sizes and greys, and (N, LINES, 4) boxes; rows of -1 are none."""
    draw = random.Random(int(held_out))
    made: list[Image.Image] = crops(SIZE, count, held_out)
    sentences = [query for query, _ in docstrings()]
    boxes = np.full((count, LINES, 4), -1.0, np.float32)
    for image, found in zip(made, boxes, strict=True):
        for number in sorted(draw.sample(range(LINES), draw.randint(2, LINES))):
            at = (draw.randint(4, SIZE // 2), number * SIZE // LINES + draw.randint(0, 10))
            font = ImageFont.load_default(size=draw.randint(12, 32))
            text = draw.choice(sentences)[: draw.randint(6, 40)].strip()
            paper = ImageDraw.Draw(image)
            box = np.clip(paper.textbbox(at, text, font=font), 0, SIZE)
            bright = np.asarray(image.crop(tuple(box)).convert("L")).mean() > 127
            grey = draw.choice((0, 40) if bright else (215, 255))
            paper.text(at, text, fill=(grey, grey, grey), font=font)
            found[number] = box
    return pixels(made, (127.5,) * 3, (127.5,) * 3), torch.from_numpy(boxes)


def example_inputs() -> Tensor:
    return pages(2, held_out=False)[0]


def train_data() -> list[Tensor]:
    return batches(pages(192, held_out=False)[0], 8)


def eval_data() -> list[tuple[Tensor, Tensor]]:
    images, boxes = pages(160, held_out=True)
    return list(zip(batches(images, 8), batches(boxes, 8), strict=True))


def boxes_of(probabilities: NDArray[Any]) -> NDArray[Any]:
    """(K, 4) boxes of one map, as the detector's own postprocessing makes them, of upright lines."""
    from skimage.measure import label, regionprops

    found = []
    for region in regionprops(label(probabilities > 0.3), probabilities):
        top, left, bottom, right = region.bbox
        height, width = bottom - top, right - left
        if min(height, width) < 3 or region.intensity_mean < 0.5:
            continue
        grown = height * width * 1.6 / (2 * (height + width))
        found.append((left - grown, top - grown, right + grown, bottom + grown))
    return np.asarray(found, np.float32).reshape(-1, 4).clip(0, SIZE)


def overlaps(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """(K, L): intersection over union of each pair of boxes."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = (high - low).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return both / (areas[0][:, None] + areas[1][None] - both)  # type: ignore[no-any-return]


def metric(outputs: Any, targets: Any) -> float:
    """The harmonic mean of precision and recall; a line is found where a box overlaps it by half."""
    right = made = wanted = 0
    for probabilities, lines in zip(np.asarray(outputs)[:, 0], np.asarray(targets), strict=True):
        lines = lines[lines[:, 2] > 0]
        boxes = boxes_of(probabilities)
        made, wanted = made + len(boxes), wanted + len(lines)
        if len(boxes) and len(lines):
            right += int((overlaps(boxes, lines).max(0) > 0.5).sum())
    return 200 * right / max(made + wanted, 1)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: NDArray[Any]) -> float:
    return metric(outputs[0], labels)
