"""Constant factors and summands of channels go into the layer in front of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_graphs import before_and_after, calls, traced
from torch import Tensor, fx, nn

from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.fold_channel_constants import FoldChannelConstants
from sqakd_fx.passes.fold_constants import FoldConstants
from sqakd_fx.program import build_program


class Frozen(nn.Module):
    """A BatchNorm with numbers for good, as detectors write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) - 0.3)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("variance", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = self.weight.reshape(shape) * (self.variance.reshape(shape) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(shape) - self.mean.reshape(shape) * scale)


def test_a_frozen_batch_norm_is_part_of_its_convolution(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Frozen(4), nn.ReLU())
    _, after = before_and_after(
        model, images, FoldConstants(), Canonicalize(), FoldChannelConstants()
    )
    conv, relu, end = after.splitlines()[-3:]
    assert conv.startswith("_0 = torch.conv2d(input_1, _0_weight_folded_1, _0_bias_folded_1,")
    assert [relu, end] == ["_2 = torch.nn.functional.relu(_0)", "return _2"]


class Scaled(nn.Module):
    """A layer, and something with a constant of its channels behind it."""

    def __init__(self, layer: nn.Module, then: Callable[[Tensor, Tensor], Tensor], *shape: int):
        super().__init__()
        self.layer, self.then = copy.deepcopy(layer), then
        self.constant = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x), self.constant)


def folded(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """The model's graph behind the pass, once it is found to compute the same."""
    wanted = model(x)
    passes = [FoldConstants(), Canonicalize(), FoldChannelConstants()]
    graph = run_passes(traced(copy.deepcopy(model), x), passes).graph_module
    torch.testing.assert_close(graph(x), wanted)
    return graph


_IMAGE, _ROWS = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 4)


@pytest.mark.parametrize(
    ("layer", "x", "shape"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), _IMAGE, (1, 6, 1, 1)),
        (nn.Conv2d(4, 6, 3, bias=False), _IMAGE, (6, 1, 1)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), _IMAGE, (6, 1, 1)),
        (nn.Conv1d(5, 6, 3), _ROWS, (1, 6, 1)),
        (nn.Linear(4, 6), _ROWS, (6,)),
    ],
    ids=["grouped", "no bias", "transposed", "conv1d", "linear"],
)
@pytest.mark.parametrize(
    "then",
    [lambda y, c: y * c, lambda y, c: c * y, lambda y, c: y + c, lambda y, c: y - c],
    ids=["y * c", "c * y", "y + c", "y - c"],
)
def test_every_layer_takes_a_constant_of_its_channels(
    layer: nn.Module, x: Tensor, shape: tuple[int, ...], then: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model = Scaled(layer, then, *shape).eval()
    assert len(calls(folded(model, x))) == 1


@pytest.mark.parametrize(
    "then",
    [
        lambda y, c: y * c,
        lambda y, c: y + c,
        lambda y, c: y * 0.125,
        lambda y, c: -3 + y,
        lambda y, c: y / 8,
        lambda y, c: y * 2.0 * c / 3 - 1,
    ],
    ids=["y * c", "y + c", "y * 0.125", "-3 + y", "y / 8", "several"],
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)], ids=str)
def test_a_layer_takes_one_number_for_all_channels(
    then: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    model = Scaled(nn.Conv2d(4, 6, 3, padding=1), then, *shape).eval()
    assert len(calls(folded(model, _IMAGE))) == 1


@pytest.mark.parametrize(
    "function", [torch.relu, nn.LeakyReLU(0.1), torch.abs], ids=["relu", "leaky", "abs"]
)
def test_a_positive_factor_passes_through_what_keeps_ratios(
    function: Callable[[Tensor], Tensor],
) -> None:
    layer = nn.Conv2d(4, 6, 3)
    for then, left in {
        lambda y, c: function(y) * c.abs(): 2,
        lambda y, c: function(y) * 1.5 + 0.25: 3,
        lambda y, c: function(y) * -1.5: 3,
        lambda y, c: torch.tanh(y) * 1.5: 3,
    }.items():
        model = Scaled(layer, then, 6, 1, 1).eval()
        assert len(calls(folded(model, _IMAGE))) == left


def _norm(channels: int, affine: bool) -> nn.Module:
    norm = nn.BatchNorm2d(channels, affine=affine)
    for name, value in (*norm.named_parameters(), *norm.named_buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2.0) if "var" in name else nn.init.normal_(value)
    return norm


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    ("then", "left"),
    [
        (lambda y, c: y * c, 1),
        (lambda y, c: y + c, 1),
        (lambda y, c: y * 1.5 - 0.25, 1),
        (lambda y, c: torch.relu(y) * c.abs(), 2),
        (lambda y, c: torch.relu(y) + c, 3),
        (lambda y, c: y * c + y, 3),
    ],
    ids=["y * c", "y + c", "numbers", "relu", "behind relu", "read twice"],
)
def test_a_batch_norm_takes_constants_behind_it(
    then: Callable[[Tensor, Tensor], Tensor], left: int, affine: bool
) -> None:
    model = Scaled(_norm(4, affine), then, 4, 1, 1).eval()
    assert len(calls(folded(model, _IMAGE))) == left


def test_a_batch_norm_that_is_called_twice_stays() -> None:
    norm = _norm(4, affine=True)
    model = nn.Sequential(norm, Scaled(norm, lambda y, c: y * c, 4, 1, 1)).eval()
    model[1].layer = norm  # type: ignore[union-attr]
    assert len(calls(folded(model, _IMAGE))) == 3


class Read(nn.Module):
    """A layer whose output is read elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 6, 3)
        self.constant = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * self.constant + torch.relu(y)


@pytest.mark.parametrize(
    "model",
    [
        Read(),
        Scaled(nn.Conv2d(4, 6, 3), lambda y, c: c - y, 6, 1, 1),
        Scaled(nn.Conv2d(4, 6, 3), lambda y, c: y * c, 4, 1),
        Scaled(nn.Conv2d(4, 6, 3), lambda y, c: y * c, 1, 1, 1, 1, 1),
        Scaled(nn.Conv2d(4, 6, 3), lambda y, c: torch.add(y, c, alpha=2), 6, 1, 1),
        Scaled(nn.ReLU(), lambda y, c: y * c, 4, 1, 1),
    ],
    ids=["read twice", "c - y", "rows", "an axis more", "alpha", "no layer"],
)
def test_anything_else_stays(model: nn.Module) -> None:
    assert len(calls(folded(model.eval(), _IMAGE))) >= 2


@pytest.mark.parametrize("batch_norm", ["fold", "absorb"])
def test_a_frozen_batch_norm_costs_no_quantizer(images: Tensor, batch_norm: str) -> None:
    layers = (nn.Conv2d(3, 4, 3), Frozen(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    plain = build_program(nn.Sequential(layers[0], *layers[2:]), images, {"batch_norm": batch_norm})
    frozen = build_program(nn.Sequential(*layers), images, {"batch_norm": batch_norm})
    assert len(list(frozen.student.children())) == len(list(plain.student.children()))
    count = [
        len([n for n in p.student.graph.nodes if n.op == "call_module"]) for p in (plain, frozen)
    ]
    assert count[0] == count[1]


@pytest.mark.parametrize("value", [float("-inf"), 0.0, 1.0])
def test_a_padding_in_front_of_a_module_is_passed_over(value: float, images: Tensor) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(nn.functional.pad(self.conv(x) * 2.0, (1, 0, 0, 1), value=value))  # type: ignore[no-any-return]

    program = build_program(Padded().eval(), images, "w8a8")
    assert "mul" not in {node.name for node in program.student.graph.nodes}
