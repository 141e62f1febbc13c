"""Models in forms that were not written for the compiler, and what compiles one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.runtime.fusion import without_kernel
from sqakd_fx.validation.validate import validate
from sqakd_fx.validation.verdict import Validation


@dataclass
class Heads:
    """An output of named parts."""

    logits: Tensor
    features: Tensor


class NamedParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Heads:
        features = torch.relu(self.body(x))
        return Heads(logits=self.head(features), features=features)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(self.norm(x + y)[:, 0])


class ByHand(nn.Module):
    """Attention by einsum, with sizes read in Python and a loop over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.size(-1))
        if n > 3:
            scores = scores.softmax(-1)
        y = torch.einsum("bhnm,bhmd->bhnd", scores, v)
        y = torch.cat([y[:, i] for i in range(y.size(1))], dim=-1)
        return self.fc(y.mean(1))


class Functional(nn.Module):
    """Weights that belong to no layer module, in-place operations, views."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.b = nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8) / 10)
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.tables = nn.ParameterDict({"fc": nn.Parameter(torch.randn(5, 8) / 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w, self.b, padding=1)
        x = F.batch_norm(x, self.mean, self.var)
        x.relu_()
        x += 0.5
        x = F.max_pool2d(x, 2).view(x.size(0), 8, -1).mean(-1)
        x = F.layer_norm(x, (8,))
        return F.linear(x, self.tables["fc"])


class Shared(nn.Module):
    """A layer called twice, a tied weight, and a checkpointed part."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6, bias=False)
        self.out.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        x = torch.relu(self.twice(x))
        x = checkpoint(lambda y: torch.relu(self.twice(y)), x, use_reentrant=False)
        return self.out(x)


class ManyInputs(nn.Module):
    """Keyword, nested and optional arguments, and a structured output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(
        self,
        ids: Tensor,
        *,
        extra: dict[str, Tensor],
        scale: float = 1.0,
        mask: Tensor | None = None,
    ) -> Any:
        x = self.left(self.table(ids).mean(1)) * scale
        y = self.right(extra["features"])
        if mask is not None:
            y = y * mask
        return {"sum": x + y, "parts": (x, y)}


class DataDependent(nn.Module):
    """A module with a loop that the data ends: a float module between quantized layers."""

    class Refine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, torch.neg, torch.abs, (x,))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.refine, self.b = nn.Linear(6, 6), self.Refine(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.refine(self.a(x)))


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = parametrizations.weight_norm(nn.Linear(6, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))


class UNet(nn.Module):
    """Pooling, transposed and nearest upsampling, concatenation of skips, zero padding."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.join = nn.Conv2d(16, 6, 1)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.down(x))
        y = torch.relu(self.middle(F.max_pool2d(skip, 2)))
        near = F.interpolate(y, scale_factor=2, mode="nearest")
        y = torch.cat([skip, torch.relu(self.up(y)), near], dim=1)
        return self.head(F.pad(torch.relu(self.join(y)), (1, 1, 1, 1)))


class Masked(nn.Module):
    """A mask built by item assignment, and a BatchNorm with no layer in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros((x.shape[2], x.shape[3]))
        mask[1:-1, 1:-1] = 1
        return self.conv(F.relu(self.norm(x) * mask))


IMAGE = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
IDS = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(3))

MODELS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], int]] = {
    "attention": (Attention, (TOKENS,), {}, 7),
    "attention by hand": (ByHand, (TOKENS,), {}, 4),
    "functional": (Functional, (IMAGE,), {}, 2),
    "shared": (Shared, (ROWS,), {}, 4),
    "many inputs": (
        ManyInputs,
        (IDS,),
        {"extra": {"features": ROWS[:, :3]}, "scale": 2.0, "mask": torch.ones(4, 4)},
        2,
    ),
    "data-dependent": (DataDependent, (ROWS,), {}, 2),
    "parametrized": (Parametrized, (ROWS,), {}, 2),
    "u-net": (UNet, (IMAGE,), {}, 5),
    "masked": (Masked, (IMAGE,), {}, 1),
    "dataclass": (NamedParts, (ROWS,), {}, 2),
    "half": (lambda: Functional().half(), (IMAGE.half(),), {}, 2),
}


def compiled(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    bits: str,
    folder: Path,
    profile: str = "container",
) -> tuple[Any, Validation]:
    """The whole way, without training: the program and what ONNX Runtime makes of it."""
    recipe = resolve_recipe(bits, settings=[f"profile={profile}"])
    program = build_program(model, args, recipe, example_kwargs=kwargs)
    example = program.traced.call.flatten(args, kwargs)
    calibrate(program.student, [example], method="minmax")
    lowered = lower(program.student).graph_module
    export(program, lowered, folder / "model.onnx")
    checked = validate(program.student, lowered, folder / "model.onnx", [example])
    assert without_kernel(lowered, checked.fusion) == {}
    return program, checked
