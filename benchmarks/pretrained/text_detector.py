"""Where text stands: PP-OCRv4's detector, a MobileNetV3 with a feature pyramid; from an ONNX file."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
from inputs import DOCSTRINGS, PHOTOGRAPHS, batches, crops, docstrings, package_file, pixels
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

FAMILY = "segmentation, from ONNX"
WEIGHTS = ("rapidocr-onnxruntime==1.4.4", "onnx2torch==1.5.15")
LIBRARIES = ("torchvision", "scikit-image", "scikit-learn")
INPUTS = f"{DOCSTRINGS}, drawn over {PHOTOGRAPHS}"
SCORE = "text pixels, intersection over union with float's (%)"
SIZE = 320


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


def pages(count: int, held_out: bool) -> Tensor:
    """Photographs with lines of text in many sizes and greys."""
    draw = random.Random(int(held_out))
    made: list[Image.Image] = crops(SIZE, count, held_out)
    sentences = [query for query, _ in docstrings()]
    for image in made:
        for _ in range(draw.randint(2, 6)):
            at = (draw.randint(0, SIZE // 2), draw.randint(0, SIZE - 40))
            font = ImageFont.load_default(size=draw.randint(12, 36))
            grey = draw.choice((0, 20, 235, 255))
            text = draw.choice(sentences)[: draw.randint(6, 40)]
            ImageDraw.Draw(image).text(at, text, fill=(grey, grey, grey), font=font)
    return pixels(made, (127.5,) * 3, (127.5,) * 3)


def example_inputs() -> Tensor:
    return pages(2, held_out=False)


def train_data() -> list[Tensor]:
    return batches(pages(192, held_out=False), 8)


def held_out() -> list[Tensor]:
    return batches(pages(48, held_out=True), 8)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: None) -> float:
    found, wanted = outputs[0] > 0.3, exact[0] > 0.3
    return float((found & wanted).sum() / np.maximum((found | wanted).sum(), 1) * 100)
