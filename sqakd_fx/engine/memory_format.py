"""The order of images in memory: channels last, which convolutions are fastest on, or as torch makes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def channels_last(x: Tensor) -> Tensor:
    """A tensor of four axes with channels last in memory; any other as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def store_channels_last(module: nn.Module) -> None:
    """Lay out parameters and buffers of four axes so, in place; `Module.to` fails on those of five.

    Also where one channel or pixel leaves the order open: convolutions follow the strides of their weight.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def store_contiguous(module: nn.Module) -> None:
    """Lay out parameters and buffers as torch makes them, in place."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
