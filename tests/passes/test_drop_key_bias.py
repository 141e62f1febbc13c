"""Biases of keys that no softmax tells are dropped, and the model stays what it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from small_graphs import traced
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.drop_key_bias import DropKeyBias
from sqakd_fx.passes.fold_constants import FoldConstants
from sqakd_fx.passes.propagate_shapes import PropagateShapes
from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe

_X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
_HEADS, _SIZE = 2, 4


class Attention(nn.Module):
    """Attention of two heads over six tokens; `scored` makes probabilities of scores (batch, head, query, key)."""

    def __init__(self, scored: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.scored, self.norm = scored, nn.LayerNorm(_SIZE)
        self.register_buffer("temperature", torch.tensor([1.5, 0.5]).reshape(1, 2, 1, 1))
        self.register_buffer("mask", torch.rand(6, 6) < 0.3)
        with torch.no_grad():
            self.k.bias += 3.0
            self.mask.fill_diagonal_(False)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(2, 6, _HEADS, _SIZE).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        mixed = self.scored(q @ k.transpose(-2, -1), self) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


ALIKE: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "a scale": lambda s, m: (s / math.sqrt(_SIZE)).softmax(-1),
    "a temperature of each head": lambda s, m: (s * m.temperature).softmax(-1),
    "a mask that is added": lambda s, m: F.softmax(s * 0.5 + m.mask * -100.0, dim=-1),
    "a mask that is filled": lambda s, m: s.masked_fill(m.mask, float("-inf")).softmax(-1),
    "a large number": lambda s, m: torch.where(m.mask, -1e9, s).softmax(-1),
    "scores beside one another": lambda s, m: s.flatten(0, 1).softmax(-1).unflatten(0, (2, 2)),
    "scores turned": lambda s, m: s.transpose(-2, -1).softmax(-2).transpose(-2, -1),
    "the largest of two": lambda s, m: (
        s.reshape(2, 2, 6, 3, 2).amax(-1).softmax(-1).repeat(1, 1, 1, 2)
    ),
    "two readers": lambda s, m: s.softmax(-1) + (2 * s).softmax(-1),
}

UNLIKE: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "a sigmoid": lambda s, m: s.sigmoid(),
    "over the queries": lambda s, m: s.softmax(-2),
    "a cap": lambda s, m: (5 * torch.tanh(s / 5)).softmax(-1),
    "a small number in the mask": lambda s, m: s.masked_fill(m.mask, -2.0).softmax(-1),
    "a weight of each key": lambda s, m: (s * torch.arange(6.0)).softmax(-1),
    "a square": lambda s, m: (s * s).softmax(-1),
    "the scores as well": lambda s, m: s.softmax(-1) + 0.01 * s,
    "a quotient of them": lambda s, m: (1 / (s.abs() + 1)).softmax(-1),
    "a softmax over all": lambda s, m: s.flatten(-2).softmax(-1).unflatten(-1, (6, 6)),
}


def _biases(net: nn.Module, x: Tensor = _X) -> dict[str, Tensor | None]:
    """The bias of every layer behind the pass, by the layer's place; the outputs are seen to stay."""
    wanted = net.double()(x.double())
    net.float()
    passes = [
        FoldConstants(),
        PropagateShapes((x,)),
        Canonicalize(),
        PropagateShapes((x,)),
        DropKeyBias(),
    ]
    made = run_passes(traced(net, x), passes).graph_module
    assert torch.allclose(made(x).double(), wanted, atol=2e-5, rtol=1e-5)
    found = {}
    for node in made.graph.nodes:
        if node.op == "call_function" and node.target in (F.linear, F.conv2d):
            bias = node.args[2]
            path = str(node.args[1].target).removesuffix(".weight")
            found[path] = None if bias is None else made.get_parameter(str(bias.target))
    return found


@pytest.mark.parametrize("scored", ALIKE.values(), ids=ALIKE)
def test_what_adds_one_number_to_all_scores_of_a_softmax_is_dropped(
    scored: Callable[[Tensor, nn.Module], Tensor],
) -> None:
    net = Attention(scored).eval()
    found = _biases(net)
    assert found["k"] is None
    assert all(torch.equal(found[name], getattr(net, name).bias) for name in ("q", "v", "out"))


@pytest.mark.parametrize("scored", UNLIKE.values(), ids=UNLIKE)
def test_what_changes_the_answer_is_kept(scored: Callable[[Tensor, nn.Module], Tensor]) -> None:
    net = Attention(scored).eval()
    found = _biases(net)
    assert torch.equal(found["k"], net.k.bias)


class Fused(nn.Module):
    """Queries, keys and values of one layer; `take` gives them from (batch, token, 3, head, size)."""

    def __init__(self, take: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.take = nn.Linear(8, 24), nn.Linear(8, 8), take

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.take(self.qkv(x).reshape(2, 6, 3, _HEADS, _SIZE))
        mixed = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x.permute(2, 0, 3, 1, 4).unbind(0),
        lambda x: tuple(part.squeeze(2).transpose(1, 2) for part in x.chunk(3, dim=2)),
        lambda x: tuple(x.permute(2, 0, 3, 1, 4)[i] for i in range(3)),
    ],
    ids=["unbind", "chunk", "index"],
)
def test_of_a_fused_layer_the_keys_alone_lose_their_bias(
    take: Callable[[Tensor], tuple[Tensor, ...]],
) -> None:
    net = Fused(take).eval()
    bias = net.qkv.bias.detach()
    wanted = torch.cat([bias[:8], torch.zeros(8), bias[16:]])
    assert torch.equal(_biases(net)["qkv"], wanted)


class Else(nn.Module):
    """Attention whose keys meet something else on the way."""

    def __init__(self, between: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.angle, self.between = nn.Parameter(torch.rand(6, 1)), between

    def forward(self, x: Tensor) -> Tensor:
        k = self.between(self.k(x), self)
        return (self.q(x) @ k.transpose(-2, -1)).softmax(-1) @ x + 0 * k.sum()


@pytest.mark.parametrize(
    "between",
    [
        lambda k, m: k * torch.cos(m.angle),
        lambda k, m: m.norm(k),
        lambda k, m: F.relu(k),
        lambda k, m: torch.cat([k, torch.zeros(2, 2, 8)], 1)[:, :6],
        lambda k, m: F.pad(k, (0, 0, 1, 0))[:, :6],
    ],
    ids=["positions", "normalization", "relu", "more keys", "padding"],
)
def test_keys_that_are_not_used_as_they_are_keep_their_bias(
    between: Callable[[Tensor, nn.Module], Tensor],
) -> None:
    net = Else(between).eval()
    assert torch.equal(_biases(net)["k"], net.k.bias)


class NonLocal(nn.Module):
    """Attention between pixels, whose keys a convolution of one pixel makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x).flatten(2), self.k(x).flatten(2)
        return x.flatten(2) @ (k.transpose(1, 2) @ q).softmax(1)


def test_keys_of_a_convolution_lose_their_bias_on_either_side_of_the_product() -> None:
    found = _biases(NonLocal().eval(), torch.randn(2, 3, 4, 4))
    assert found["k"] is None
    assert found["q"] is not None


class OfOneSample(nn.Module):
    """Keys of a convolution of the first sample alone: its channels come first, and are as many as its pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k = nn.Conv1d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.k(x[0]).transpose(0, 1)).softmax(-1)


def test_a_convolution_without_a_batch_axis_keeps_its_bias() -> None:
    net, x = OfOneSample().eval(), torch.randn(2, 3, 4)
    passes = [PropagateShapes((x,)), Canonicalize(), PropagateShapes((x,)), DropKeyBias()]
    assert not run_passes(traced(net, x), passes).log[-1].changed


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_attention_loses_the_bias_of_its_keys(masked: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            with torch.no_grad():
                self.attention.in_proj_bias.copy_(torch.arange(24.0) + 1)

        def forward(self, x: Tensor) -> Tensor:
            mask = x[..., 0] > 1.5 if masked else None
            return self.attention(x, x, x, key_padding_mask=mask)[0]

    program = build_program(Net().eval(), _X, "w8a8")
    layers = [node for node in program.teacher.graph.nodes if node.target is F.linear]
    assert [node.args[2] is None for node in layers].count(True) == 1
    with torch.no_grad():
        assert torch.allclose(program.teacher(_X), Net().eval()(_X), atol=1e-5)


def test_a_bias_that_keys_have_in_common_takes_no_levels() -> None:
    """A trained decoder's keys were all within 2 % of their bias; at 8 bits it ended a third of its answers off."""
    net = Attention(lambda s, m: (s * 0.5).softmax(-1)).eval()
    with torch.no_grad():
        net.k.bias.fill_(60.0)
        net.q.bias.fill_(0.1)
    program = build_program(net, _X, resolve_recipe("w8a8"))
    calibrate(program.student, [(_X,)], method="output")
    with torch.no_grad():
        wanted, got = program.teacher(_X), program.student(_X)
    assert float((got - wanted).norm() / wanted.norm()) < 0.02
