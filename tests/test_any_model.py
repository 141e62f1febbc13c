"""Models in forms that were not written for the compiler, each from trace to ONNX Runtime."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from sqakd_fx.calibrate import calibrate
from sqakd_fx.compiler import largest_difference, tensors_of
from sqakd_fx.errors import TraceError
from sqakd_fx.exporting import export_onnx
from sqakd_fx.frontend import trace
from sqakd_fx.fusion import without_kernel
from sqakd_fx.program import build_program, layer_facts, lower
from sqakd_fx.recipe import resolve_recipe
from sqakd_fx.validate import Validation, validate


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
    """A module with a loop that the data ends: a float island between quantized layers."""

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
    program = build_program(model, args, kwargs, recipe)
    example = program.traced.call.flatten(args, kwargs)
    calibrate(program.student, [example], method="minmax")
    lowered = lower(program.student).graph_module
    export_onnx(lowered, program, recipe, folder / "model.onnx")
    checked = validate(program.student, lowered, folder / "model.onnx", [example])
    assert without_kernel(lowered, checked.fusion) == {}
    return program, checked


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2", "w1a1"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_through_whole(name: str, bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, args, kwargs, layers = MODELS[name]
    model = make().eval()
    program, checked = compiled(model, args, kwargs, bits, tmp_path)
    assert checked.failures == ()
    assert len(layer_facts(program.student)) == layers


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_through_packed(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, args, kwargs, _ = MODELS[name]
    _, checked = compiled(make().eval(), args, kwargs, "w2a2", tmp_path, "packed")
    assert checked.failures == ()


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "half"])
def test_the_traced_graph_is_the_model_at_other_batch_sizes_too(name: str, front_end: str) -> None:
    torch.manual_seed(0)
    make, args, kwargs, _ = MODELS[name]
    model = make().eval()
    found = trace(model, args, kwargs, front_end=front_end)  # type: ignore[arg-type]

    def resized(x: Any) -> Any:
        return torch.cat([x.flip(0), x[:1]]) if isinstance(x, Tensor) else x

    args, kwargs = torch.utils._pytree.tree_map(resized, (args, kwargs))
    with torch.no_grad():
        wanted = tensors_of(model(*args, **kwargs))
        got = tensors_of(found.graph_module(*found.call.flatten(args, kwargs)))
    assert largest_difference(wanted, got) <= 1e-5
    assert found.front_end == front_end


def test_what_cannot_be_traced_is_an_island_with_the_line_of_the_users_code() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while x.abs().max() > 1:  # the line
                x = x / 2
            return x

    model = nn.Sequential(nn.Linear(6, 6), Loop(), nn.Linear(6, 4)).eval()
    found = trace(model, (ROWS,))
    assert found.decisions
    assert __file__ in found.decisions[0]


def test_a_forward_that_cannot_be_traced_names_its_line_and_a_way_out() -> None:
    class Numpy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(x.detach().numpy() * float(x.sum().item()))

    with pytest.raises(TraceError, match=rf"{__file__}:\d+.*frontend=export"):
        trace(Numpy(), (ROWS,), front_end="symbolic")


def test_the_recipe_keeps_a_submodule_whole_or_lets_the_example_decide(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), DataDependent()).eval()
    program = build_program(model, (ROWS,), {}, resolve_recipe("w8a8", islands=["0"]))
    assert {fact.name for fact in layer_facts(program.student)} == {"1.a", "1.b"}
    assert "recipe keeps it" in program.notes[0].reason
    whole = build_program(model, (ROWS,), {}, resolve_recipe("w8a8"))
    assert "decided = ['1.refine']" in whole.notes[0].reason
    with pytest.raises(TraceError, match=r"did you mean 1\.refine"):
        build_program(model, (ROWS,), {}, resolve_recipe("w8a8", decided=["1.refin"]))


def test_a_submodule_that_the_recipe_keeps_whole_may_be_most_of_the_model() -> None:
    wide = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 6))
    model = nn.Sequential(nn.Linear(6, 6), wide, nn.Linear(6, 4)).eval()
    program = build_program(model, (ROWS,), {}, resolve_recipe("w8a8", islands=["1"]))
    assert {fact.name for fact in layer_facts(program.student)} == {"0", "2"}
    with pytest.raises(TraceError, match=r"keeps no submodule whole.*islands name 1"):
        trace(model, (ROWS,), front_end="export", islands=["1"])
