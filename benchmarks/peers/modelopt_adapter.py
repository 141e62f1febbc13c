"""NVIDIA Model Optimizer: INT8_DEFAULT_CFG, calibrated, then trained (8 bits)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import modelopt.torch.quantization as mtq
from torch import Tensor, nn


def prepare(
    model: nn.Module, example: Tensor, bits: int, calibration: Sequence[Tensor]
) -> nn.Module:
    """A trainable simulation of `model`, calibrated on batches of images."""
    if bits != 8:
        raise ValueError("this adapter offers INT8_DEFAULT_CFG only")

    def see(quantized: nn.Module) -> None:
        for batch in calibration:
            quantized(batch)

    ready: nn.Module = mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, see)
    return ready.train()


def frozen(model: nn.Module) -> nn.Module:
    return model.eval()
