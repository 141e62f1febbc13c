"""NNCF: post-training quantization inserts and calibrates the quantizers, which then train (8 bits)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import nncf
from torch import Tensor, nn


def prepare(
    model: nn.Module, example: Tensor, bits: int, calibration: Sequence[Tensor]
) -> nn.Module:
    """A trainable simulation of `model`, calibrated on batches of images."""
    if bits != 8:
        raise ValueError("NNCF trains at 8 bits only")
    data = nncf.Dataset(list(calibration))
    return nncf.quantize(  # type: ignore[no-any-return]
        copy.deepcopy(model),
        data,
        subset_size=len(calibration),
        model_type=_model_type(model),
    ).train()


def frozen(model: nn.Module) -> nn.Module:
    return model.eval()


def export(model: nn.Module, images: Tensor, float_file: str, into: str) -> None:
    """NNCF quantizes the float ONNX model itself, with its default settings."""
    import onnx

    whole = onnx.load(float_file)
    name = whole.graph.input[0].name
    quantized = nncf.quantize(
        whole, nncf.Dataset([{name: images.numpy()}]), subset_size=1, model_type=_model_type(model)
    )
    onnx.save(quantized, into)


def _model_type(model: nn.Module) -> nncf.ModelType | None:
    transformer = any(isinstance(m, nn.LayerNorm) for m in model.modules())
    return nncf.ModelType.TRANSFORMER if transformer else None
