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
    transformer = any(isinstance(m, nn.LayerNorm) for m in model.modules())
    return nncf.quantize(  # type: ignore[no-any-return]
        copy.deepcopy(model),
        data,
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    ).train()


def frozen(model: nn.Module) -> nn.Module:
    return model.eval()
