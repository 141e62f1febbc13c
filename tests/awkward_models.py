"""Models that once failed or came out wrong."""

from __future__ import annotations

from typing import Any

import torch
from common_models import IDS, IMAGE, ROWS, TOKENS
from torch import Tensor, nn
from torch.nn import functional as F


class ChangedView(nn.Module):
    """A change in place of a slice, read through the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, :4].relu_()
        return self.b(x)


class ChangedBehindBatchNorm(nn.Module):
    """Changes in place of slices of what a BatchNorm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x[:, :4].mul_(0.5)
        x[:, 4:].add_(1.0)
        return self.b(x)


class Hooked(nn.Module):
    """Hooks that change what a layer takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.a.register_forward_hook(lambda module, inputs, output: output * 2)
        self.b.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Norm(nn.Module):
    """Weights that hooks compute, as torch.nn.utils.weight_norm leaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
        self.b = nn.utils.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).mean((2, 3)))


class SizeOfUnused(nn.Module):
    """A layer that runs only to be asked for its size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = self.a(x).size()
        return self.a(x).reshape(b, c, -1)


class NotOnlyTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"n": len(x), "none": None, "y": self.a(x), "four": 4}


class SequenceFirst(nn.Module):
    """Layers on (length, batch, features), as in DETR and CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 4, add_bias_kv=True, add_zero_attn=True)
        self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(1, 0, 2)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.b(torch.relu(self.a(x))).permute(1, 0, 2)


class Cells(nn.Module):
    """Recurrent cells in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.g, self.r = nn.LSTMCell(16, 8), nn.GRUCell(8, 6), nn.RNNCell(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 8)
        g, r = x.new_zeros(len(x), 6), x.new_zeros(len(x), 4)
        for t in range(2):
            h, c = self.l(x[:, t], (h, c))
            g = self.g(h, g)
            r = self.r(g, r)
        return r


class UpTo(nn.Module):
    """A transposed convolution that is told its output size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)), output_size=x.shape[2:]) + x


class Patches(nn.Module):
    """F.unfold, which shares its name with Tensor.unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(27, 27)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(F.unfold(x, 3, padding=1).transpose(1, 2)).transpose(1, 2)
        return F.fold(y, (12, 12), 3, padding=1)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.EmbeddingBag(11, 8, mode="sum"), nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.a(ids))


class Casts(nn.Module):
    """Half precision inside a float model: a cast there and back, and autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.a(x)
        return self.b(torch.relu(x).half().float())


class HalfThroughout(nn.Module):
    """A half-precision model that casts its input, makes half constants and returns float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x.half()) * torch.full((8,), 0.5, dtype=torch.float16)
        return self.b(torch.relu(y).to(self.b.weight.dtype)).to(torch.float32)


HALVES: dict[str, type[nn.Module]] = {"casts": Casts, "half throughout": HalfThroughout}


class Mixed(nn.Module):
    """Normalizations, moves, the larger of two, reductions, and a split handed on as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.maximum(self.a(x), self.b(x.roll(2, dims=3)))
        y = self.instance(self.c(self.group(y)))
        y = F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2)
        y = torch.where(y > 0, y, 0.1 * y)
        y = torch.stack(y.split(4, dim=1), dim=1).flatten(1, 2)
        index = torch.arange(7, -1, -1, device=y.device)
        picked = y.amax((2, 3)).gather(1, index.repeat(len(y), 1))
        return self.d(torch.cat([picked, y.mean((2, 3)), y.sum((2, 3)), y.std((2, 3))], dim=1))


class Norms(nn.Module):
    """BatchNorm that cannot be folded: behind ReLU, before padding, on a shared layer, read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](torch.relu(self.a(x)))
        z = self.b(y)
        twice = self.norms[1](self.b(z)) + self.norms[2](self.b(y))
        return twice + self.norms[3](z) + z


class Einsums(nn.Module):
    """Weights of several axes, of either side, and axes without a letter."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(2, 16, 8) / 4)
        self.join = nn.Parameter(torch.randn(2, 8, 12) / 4)
        self.out = nn.Parameter(torch.randn(5, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(torch.einsum("bnc,hcd->bhnd", x, self.heads))
        y = torch.einsum("bhnd,hde->bne", y, self.join)
        return torch.einsum("oe,...e->o...", self.out, y).permute(1, 2, 0)


class BroadcastEinsum(nn.Module):
    """An axis of size 1 that einsum takes for one of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(6, 1)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(torch.einsum("bnc,dc->bnd", x, self.weight)))


class PartOfABias(nn.Module):
    """A part of a copied bias set to zero through a view, as Swin v2's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.a.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        return self.b(torch.relu(F.linear(x, self.a.weight, bias)))


class ChangedAfterItWasRead(nn.Module):
    """A copied bias that a layer reads before a part of it changes, and another after."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.a.bias.clone()
        x = torch.relu(F.linear(x, self.a.weight, bias))
        bias[2:4].zero_()
        return self.b(torch.relu(F.linear(x, self.a.weight, bias)))


class PaddedNorm(nn.Module):
    """A BatchNorm behind a padding, which it cannot be merged with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.c = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.pad(self.a(x), (1, 1, 1, 1))))


class RoundedUp(nn.Module):
    """Average pooling of inputs whose last windows go beyond the end, in both forms."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True)
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.c = nn.Conv2d(3, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(F.avg_pool2d(x, 2, ceil_mode=True))
        z = F.pad(self.c(x), (0, 1, 0, 1))
        return self.b(self.pool(torch.relu(y))) + self.b(self.pool(torch.relu(z)))


WAVE = torch.randn(4, 640, generator=torch.Generator().manual_seed(4))


class Spectrogram(nn.Module):
    """A transform to frequencies inside the model, and what torch writes with factors of one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.a, self.b = nn.Conv1d(33, 8, 3), nn.Conv1d(8, 4, 3)

    def forward(self, wave: Tensor) -> Tensor:
        parts = torch.stft(wave, 64, 32, window=self.window, return_complex=True)
        y = self.a(F.pad(torch.log1p(parts.abs()), (2, 0)))
        return self.b(F.elu(y)).mean(2)


class WithoutBatch(nn.Module):
    """A convolution of one image without a batch axis beside one of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x) + self.b(x[0])))


AWKWARD: dict[str, tuple[type[nn.Module], Tensor]] = {
    "changed view": (ChangedView, IMAGE),
    "changed behind BatchNorm": (ChangedBehindBatchNorm, IMAGE),
    "hooked": (Hooked, ROWS),
    "norm by hook": (Norm, IMAGE),
    "size of unused": (SizeOfUnused, IMAGE),
    "not only tensors": (NotOnlyTensors, ROWS),
    "sequence first": (SequenceFirst, TOKENS),
    "cells": (Cells, TOKENS),
    "up to a size": (UpTo, IMAGE),
    "patches": (Patches, IMAGE),
    "bag": (Bag, IDS),
    "mixed": (Mixed, IMAGE),
    "norms": (Norms, IMAGE),
    "einsums": (Einsums, TOKENS),
    "broadcast einsum": (BroadcastEinsum, TOKENS),
    "part of a bias": (PartOfABias, ROWS),
    "rounded up": (RoundedUp, torch.randn(4, 3, 11, 11)),
    "padded norm": (PaddedNorm, IMAGE),
    "changed after it was read": (ChangedAfterItWasRead, ROWS),
    "spectrogram": (Spectrogram, WAVE),
    "without batch": (WithoutBatch, IMAGE),
}


class PaddedPool(nn.Module):
    """A pad in front of a pool whose last windows reach over the edge."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(F.pad(x, (1, 0, 0, 1)), 2, ceil_mode=True)
        return self.a((y[:, :, :, :3] + x[:, :, :4, :3]).mean((2, 3)))
