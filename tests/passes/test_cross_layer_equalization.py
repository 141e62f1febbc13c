"""What cross-layer equalization makes of chains of layers, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from seam_networks import IMAGES, NETWORKS, canonical, lively, relative_difference
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.errors import PassError
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.ir.rewriting import get_attribute
from sqakd_fx.passes.cross_layer_equalization import CrossLayerEqualization
from sqakd_fx.plan.channel_seams import find_seams


def equalized(model: nn.Module, *inputs: Tensor) -> Any:
    return run_passes(canonical(model, *inputs), [CrossLayerEqualization()])


def reasons(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    return {note.node: note.reason for note in equalized(model, *inputs).log[-1].notes}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_function_stays_and_the_code_too(network: str) -> None:
    make, x = NETWORKS[network]
    graph = canonical(lively(make()), x)
    before, code, weights = graph(x), graph.code, copy.deepcopy(graph.state_dict())
    after = run_passes(graph, [CrossLayerEqualization()]).graph_module
    assert relative_difference(after(x), before) < 1e-5
    assert after.code == code
    moved = [
        name for name, value in after.state_dict().items() if not torch.equal(value, weights[name])
    ]
    assert len(moved) >= 2


def test_seams_are_found_by_what_reads_the_channels() -> None:
    found = {
        network: [
            (seam.source.name, [reader.layer.name for reader in seam.readers])
            for seam in find_seams(canonical(lively(make()), x))[0]
        ]
        for network, (make, x) in NETWORKS.items()
    }
    assert found["convolutions"] == [
        ("expand", ["depthwise"]),
        ("depthwise", ["project"]),
        ("norm", ["grouped"]),
        ("grouped", ["up"]),
        ("up", ["fc1"]),
        ("fc1", ["fc2"]),
    ]
    for network in ("attention by hand", "fused attention", "RMSNorm"):
        assert [readers for _, readers in found[network]] == [["qkv"], ["out"], ["up"]], network
    assert found["concatenated"] == [
        ("left", ["gate", "join"]),
        ("right", ["gate", "join"]),
        ("join", ["head"]),
    ]


def test_only_the_values_of_an_attention_change_size() -> None:
    make, x = NETWORKS["attention by hand"]
    (values,) = [s for s in find_seams(canonical(make(), x))[0] if s.source.name == "qkv"]
    assert (values.written[0].channel.flatten() >= 0).tolist() == [False] * 32 + [True] * 16


class Chain(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=bias), nn.Conv2d(8, 8, 3, groups=8)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def test_weights_on_both_sides_end_of_one_size_in_every_channel() -> None:
    after = equalized(lively(Chain()), IMAGES).graph_module
    a, b, c = (get_attribute(after, f"{name}.weight") for name in "abc")
    written, read = a.abs().amax((1, 2, 3)), b.abs().amax((1, 2, 3))
    assert torch.allclose(written, read, rtol=1e-2)
    assert torch.allclose(read, c.abs().amax((0, 2, 3)), rtol=1e-2)


def test_a_channel_that_is_always_zero_keeps_its_weights() -> None:
    model = lively(Chain())
    with torch.no_grad():
        model.a.weight[2] = 0.0  # type: ignore[union-attr, index]
        model.c.weight[:, 5] = 0.0  # type: ignore[union-attr, index]
    graph = canonical(model, IMAGES)
    before = graph(IMAGES)
    after = run_passes(graph, [CrossLayerEqualization()]).graph_module
    assert relative_difference(after(IMAGES), before) < 1e-5


class Pair(nn.Module):
    """Two convolutions with something between them; `between` takes what the first gives and the input."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1), between
        self.offset = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x), x))


REFUSED = {
    "relu6 clips every channel at the same value": lambda net, y, x: F.relu6(y),
    "sigmoid does not keep the sizes of channels": lambda net, y, x: torch.sigmoid(y),
    "adds what keeps its size": lambda net, y, x: F.relu(y) + x[:, :1],
    "multiplies two of them": lambda net, y, x: y * y,
    "divides by them": lambda net, y, x: x[:, :1] / y,
    "averages over several of them": lambda net, y, x: y.mean(1, keepdim=True).expand(
        -1, 4, -1, -1
    ),
    "clamp clips every channel at the same value": lambda net, y, x: y.clamp(-1, 1),
    "softmax does not keep the sizes of channels": lambda net, y, x: y.softmax(1),
    "reads several channels as one": lambda net, y, x: y.transpose(1, 2)[:, :4],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_keep_sizes_is_refused_with_the_reason(reason: str) -> None:
    model = Pair(REFUSED[reason])
    graph = canonical(model, IMAGES)
    weights = copy.deepcopy(graph.state_dict())
    result = run_passes(graph, [CrossLayerEqualization()])
    (note,) = [note for note in result.log[-1].notes if note.node == "a"]
    assert reason in note.reason
    assert all(torch.equal(v, weights[k]) for k, v in result.graph_module.state_dict().items())


KEPT = {
    "relu": lambda net, y, x: F.relu(y),
    "a sum with itself": lambda net, y, x: y + F.relu(y),
    "a sum with a constant of each channel": lambda net, y, x: F.relu(y + net.offset),
    "a product with what has no channels": lambda net, y, x: y * torch.sigmoid(x[:, :1]),
    "a number": lambda net, y, x: F.relu(y) * 2 / 3,
    "zero padding": lambda net, y, x: F.pad(F.relu(y), (1, 0, 0, 2)),
    "nearest and linear upsampling": lambda net, y, x: F.interpolate(
        F.interpolate(y, scale_factor=2), scale_factor=2, mode="bilinear"
    ),
    "chunks": lambda net, y, x: torch.cat(y.chunk(2, 1)[::-1], 1),
    "a part of the channels": lambda net, y, x: torch.cat([F.relu(y[:, :2]), F.relu6(y[:, 2:])], 1),
    "clamp from zero": lambda net, y, x: y.clamp(min=0),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_keeps_the_ratios_of_a_channel_lets_sizes_through(what: str) -> None:
    torch.manual_seed(1)
    graph = canonical(lively(Pair(KEPT[what])), IMAGES)
    before, weight = graph(IMAGES), graph.get_parameter("b.weight").clone()
    after = run_passes(graph, [CrossLayerEqualization()]).graph_module
    assert not torch.equal(after.get_parameter("b.weight"), weight)
    assert relative_difference(after(IMAGES), before) < 1e-5


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(F.relu(self.a(x)))))


def test_a_weight_that_is_used_twice_stays() -> None:
    assert any(
        "used more than once" in reason for reason in reasons(Twice(), torch.randn(2, 4)).values()
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.relu(self.a(x))))


def test_a_weight_that_is_tied_to_another_stays() -> None:
    told = reasons(Tied(), torch.randn(2, 4))
    assert "used more than once" in told["a"]
    assert "used more than once" in told["b"]


def test_a_graph_in_training_mode_is_refused() -> None:
    graph = canonical(Chain(), IMAGES).train()
    with pytest.raises(PassError, match=r"cross_layer_equalization: .*eval"):
        run_passes(graph, [CrossLayerEqualization()])
