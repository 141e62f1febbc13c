"""Constant numbers behind an activation go into the layers that read it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_graphs import calls, traced
from torch import Tensor, fx, nn

from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.fold_channel_constants import FoldChannelConstants
from sqakd_fx.passes.fold_constants import FoldConstants
from sqakd_fx.passes.fold_scalars import FoldScalars
from sqakd_fx.program import build_program

_IMAGE, _ROWS = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 4)
_UNPADDED: dict[str, tuple[nn.Module, Tensor]] = {
    "conv": (nn.Conv2d(4, 6, 3, groups=2), _IMAGE),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), _IMAGE),
    "conv1d": (nn.Conv1d(5, 6, 3), _ROWS),
    "linear": (nn.Linear(4, 6), _ROWS),
}
_PADDED: dict[str, tuple[nn.Module, Tensor]] = {
    "padded": (nn.Conv2d(4, 4, 3, padding=1, groups=4), _IMAGE),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), _IMAGE),
    "one axis": (nn.Conv2d(4, 6, 3, padding=(0, 1)), _IMAGE),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, groups=2), _IMAGE),
}


class Affine(nn.Module):
    """An activation, numbers behind it, and layers that read what comes of it."""

    def __init__(self, then: Callable[[Tensor], Tensor], *layers: nn.Module, stored: bool = False):
        super().__init__()
        self.then, self.layers = then, nn.ModuleList(layers)
        self.a, self.b = (nn.Parameter(torch.tensor([x])) for x in (1.5, 0.25))
        self.stored = stored

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.tanh(x)
        x = x * self.a + self.b if self.stored else self.then(x)
        return [layer(x) for layer in self.layers]


def folded(model: nn.Module, x: Tensor) -> fx.GraphModule:
    passes = [FoldConstants(), Canonicalize(), FoldChannelConstants(), FoldScalars()]
    wanted = model.eval()(x)
    graph = run_passes(traced(copy.deepcopy(model), x), passes).graph_module
    torch.testing.assert_close(graph(x), wanted)
    return graph


_PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x * a": lambda x: x * -1.5,
    "a * x": lambda x: 3 * x,
    "x / a": lambda x: x / 8,
    "x * a * b": lambda x: x * 0.5 * 3.0,
}
_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "x + b": lambda x: x + 0.5,
    "x - b": lambda x: x - 2,
    "x * a + b": lambda x: x * 1.5 + 0.25,
    "(x + b) * a": lambda x: (x + 0.25) * 1.5,
    "x + b + c": lambda x: x + 0.25 + 1.5,
}


@pytest.mark.parametrize("layer", [*_UNPADDED, *_PADDED])
@pytest.mark.parametrize("then", _PRODUCTS)
def test_every_layer_takes_a_factor(layer: str, then: str) -> None:
    module, x = {**_UNPADDED, **_PADDED}[layer]
    assert len(calls(folded(Affine(_PRODUCTS[then], module), x))) == 2


@pytest.mark.parametrize("layer", _UNPADDED)
@pytest.mark.parametrize("then", _SUMS)
def test_a_layer_that_pads_nothing_takes_a_summand(layer: str, then: str) -> None:
    module, x = _UNPADDED[layer]
    assert len(calls(folded(Affine(_SUMS[then], module), x))) == 2


@pytest.mark.parametrize("layer", _PADDED)
@pytest.mark.parametrize("stored", [False, True], ids=["numbers", "tensors"])
def test_in_front_of_zeros_the_summand_stays_and_the_factor_goes(layer: str, stored: bool) -> None:
    module, x = _PADDED[layer]
    names = calls(folded(Affine(_SUMS["x * a + b"], module, stored=stored), x))
    assert len(names) == 3
    assert "mul" not in str(names)


def test_all_layers_that_read_it_take_it() -> None:
    layers = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 3, 2, bias=False)
    assert len(calls(folded(Affine(_SUMS["x * a + b"], *layers), _IMAGE))) == 4


_SHARED = nn.Conv2d(4, 4, 1)


@pytest.mark.parametrize(
    "model",
    [
        Affine(lambda x: x * 1.5, nn.Conv2d(4, 6, 3), nn.Identity()),
        Affine(lambda x: x * 1.5, nn.Sequential(_SHARED, nn.ReLU(), _SHARED)),
        Affine(lambda x: x * 1.5, nn.BatchNorm2d(4)),
        Affine(lambda x: 1.5 / (x + 3), nn.Conv2d(4, 6, 3)),
        Affine(lambda x: 1.5 - x, nn.Conv2d(4, 6, 3)),
        Affine(lambda x: x / float("inf"), nn.Conv2d(4, 6, 3)),
        Affine(lambda x: x * 1e-3 + 5.0, nn.Conv2d(4, 6, 3, padding=1)),
        Affine(lambda x: x * torch.ones(2, 1, 1, 1, 1), nn.Conv3d(2, 6, 1)),
    ],
    ids=[
        "read elsewhere",
        "shared",
        "no layer",
        "a / x",
        "a - x",
        "infinite",
        "tiny factor",
        "an axis more",
    ],
)
def test_anything_else_stays(model: nn.Module) -> None:
    model.eval()
    passes = [FoldConstants(), Canonicalize()]
    before = run_passes(traced(copy.deepcopy(model), _IMAGE), passes).graph_module
    assert len(calls(folded(model, _IMAGE))) == len(calls(before))


class LearnedAffine(nn.Module):
    """As networks of text recognition have it behind convolutions and activations."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([a])), nn.Parameter(torch.tensor([b]))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x + self.b


def test_learned_affines_cost_no_quantizer_but_in_front_of_zeros(images: Tensor) -> None:
    first, second, third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
    affine = LearnedAffine(1.3, 0.2)
    plain = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
    learned = nn.Sequential(
        first, affine, nn.ReLU(), affine, second, affine, nn.ReLU(), LearnedAffine(0.7, 0.1), third
    )
    count = [
        len(list(build_program(model.eval(), images, "w8a8").student.children()))
        for model in (plain, learned)
    ]
    assert count[1] <= count[0] + 3


@pytest.mark.parametrize("batch_norm", ["fold", "absorb"])
def test_learned_affines_behind_batch_norms_cost_no_product(
    images: Tensor, batch_norm: str
) -> None:
    def block(channels: int) -> nn.Sequential:
        conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), LearnedAffine(1.3, 0.2))

    model = nn.Sequential(block(3), block(4), nn.Conv2d(4, 4, 1)).eval()
    student = build_program(model, images, {"batch_norm": batch_norm}).student
    assert not [node for node in student.graph.nodes if "mul" in node.name]
    torch.testing.assert_close(student(images), model(images))
