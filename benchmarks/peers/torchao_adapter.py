"""torchao: PT2E quantization-aware training with its x86 quantizer (8 bits)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import (
    allow_exported_model_train_eval,
    disable_observer,
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)


def prepare(
    model: nn.Module, example: Tensor, bits: int, calibration: Sequence[Tensor]
) -> nn.Module:
    """A trainable simulation of `model`, whose observers have seen batches of images."""
    if bits != 8:
        raise ValueError("torchao's x86 quantizer trains at 8 bits only")
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(
        copy.deepcopy(model).train(), (example,), dynamic_shapes=({0: batch},)
    ).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    ready = prepare_qat_pt2e(exported, quantizer)
    allow_exported_model_train_eval(ready)
    ready.eval()
    with torch.no_grad():
        for images in calibration:
            ready(images)
    move_exported_model_to_train(ready)
    return ready


def frozen(model: nn.Module) -> nn.Module:
    model.eval()
    model.apply(disable_observer)
    return model
