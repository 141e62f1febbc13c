"""Networks whose channels can change size, some of them in every way that the passes know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sqakd_fx.frontend.trace import trace
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.propagate_shapes import PropagateShapes


class Convolutions(nn.Module):
    """Convolution, BatchNorm, depthwise and transposed convolution, PReLU, pools and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.prelu = nn.PReLU(12)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2, groups=3)
        self.fc1 = nn.Linear(6 * 25, 10)
        self.fc2 = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.expand(x))))
        x = F.leaky_relu(self.norm(self.project(x)), 0.1)
        x = self.up(F.max_pool2d(self.prelu(self.grouped(x)), 2))
        x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 4)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class PreNorm(nn.Module):
    """A transformer block that normalizes first, its attention by hand or by torch's function."""

    def __init__(self, fused: bool = False, rms: bool = False) -> None:
        super().__init__()
        norm: Any = nn.RMSNorm if rms else nn.LayerNorm
        self.norm1, self.norm2 = norm(16), norm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).reshape(batch, length, 3, 4, width // 4)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Concatenated(nn.Module):
    """Two branches that meet in one layer, channels shuffled, gated by what they hold, and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.gate, self.join = nn.Linear(8, 8), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        y = F.channel_shuffle(y, 2)
        gate = torch.sigmoid(self.gate(y.mean((2, 3))))
        y = F.relu(self.join(y * gate[:, :, None, None]))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(
    -1, 1, 16
)

NETWORKS: dict[str, tuple[Any, Tensor]] = {
    "convolutions": (Convolutions, IMAGES),
    "attention by hand": (PreNorm, TOKENS),
    "fused attention": (lambda: PreNorm(fused=True), TOKENS),
    "RMSNorm": (lambda: PreNorm(rms=True), TOKENS),
    "concatenated": (Concatenated, IMAGES),
}


def lively(model: nn.Module) -> nn.Module:
    """The model with weights whose channels differ in size by a factor of a thousand."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            for value in module._parameters.values():
                if value is not None and value.ndim and len(value) > 1:
                    shape = (-1,) + (1,) * (value.ndim - 1)
                    value.mul_(
                        torch.logspace(-1.5, 1.5, len(value))[torch.randperm(len(value))].reshape(
                            shape
                        )
                    )
    return model.eval()


def canonical(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The traced float graph in canonical form, with shapes."""
    traced = trace(model.eval(), inputs).graph_module
    passes = [PropagateShapes(inputs), Canonicalize(), PropagateShapes(inputs)]
    return run_passes(traced, passes).graph_module.eval()


def relative_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())
