"""What moves from activations into weights, and that the function stays."""

from __future__ import annotations

import copy

import pytest
import torch
from seam_networks import NETWORKS, TOKENS, PreNorm, canonical, lively, relative_difference
from torch import Tensor, nn

from sqakd_fx.errors import PassError
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.smooth_activations import SmoothActivations
from sqakd_fx.quant.input_statistics import input_statistics


def largest(graph: torch.fx.GraphModule, *inputs: Tensor) -> dict[str, Tensor]:
    return {name: one.largest for name, one in input_statistics(graph, [inputs]).items()}


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_function_stays_and_the_code_too(network: str, strength: float) -> None:
    make, x = NETWORKS[network]
    graph = canonical(lively(make()), x)
    before, code, weights = graph(x), graph.code, copy.deepcopy(graph.state_dict())
    after = run_passes(graph, [SmoothActivations(largest(graph, x), strength)]).graph_module
    assert relative_difference(after(x), before) < 1e-5
    assert after.code == code
    assert not all(torch.equal(value, weights[name]) for name, value in after.state_dict().items())


def spread(sizes: Tensor) -> float:
    return float(sizes.max() / sizes.min())


def test_strength_one_makes_all_channels_of_an_activation_alike() -> None:
    graph = canonical(lively(PreNorm()), TOKENS)
    before = largest(graph, TOKENS)
    after = run_passes(graph, [SmoothActivations(before, 1.0)]).graph_module
    smoothed = largest(after, TOKENS)
    for layer in ("qkv", "up"):
        assert spread(before[layer]) > 10
        assert spread(smoothed[layer]) < 1.001
    assert torch.equal(smoothed["down"], before["down"]) or torch.allclose(
        smoothed["down"], before["down"], rtol=1e-4
    )


def test_strength_zero_makes_the_weights_of_all_channels_alike() -> None:
    graph = canonical(lively(PreNorm()), TOKENS)
    after = run_passes(graph, [SmoothActivations(largest(graph, TOKENS), 0.0)]).graph_module
    assert spread(after.get_parameter("up.weight").abs().amax(0)) < 1.001


class PostNorm(nn.Module):
    """The normalization is read by a layer and by the sum behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.fc(x)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))


class TwoAxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm((5, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (PostNorm, "add adds what keeps its size"),
        (Bare, "has no weight of its own"),
        (TwoAxes, "normalizes over several axes"),
    ],
)
def test_a_normalization_that_cannot_change_is_refused_with_the_reason(
    model: type[nn.Module], reason: str
) -> None:
    graph = canonical(model(), TOKENS)
    result = run_passes(graph, [SmoothActivations(largest(graph, TOKENS))])
    (note,) = [note for note in result.log[-1].notes if note.node == "norm"]
    assert reason in note.reason


class ByHand(nn.Module):
    """RMSNorm spelt out, and a normalization whose offset is added behind its product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = (
            nn.Parameter(torch.rand(16) + 0.5),
            nn.Parameter(torch.rand(16) + 0.5),
        )
        self.offset = nn.Parameter(torch.randn(16))
        self.gate, self.up, self.fc = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        y = self.weight * y
        z = (x - x.mean(-1, keepdim=True)) * self.other + self.offset
        return torch.cat([nn.functional.silu(self.gate(y)) * self.up(y), self.fc(z)], -1)


def test_normalizations_that_are_spelt_out_count_as_well() -> None:
    torch.manual_seed(0)
    graph = canonical(ByHand(), TOKENS)
    before, old = graph(TOKENS), largest(graph, TOKENS)
    after = run_passes(graph, [SmoothActivations(old, 1.0)]).graph_module
    assert relative_difference(after(TOKENS), before) < 1e-5
    new = largest(after, TOKENS)
    for layer in ("gate", "up", "fc"):
        assert spread(new[layer]) < 1.001 < spread(old[layer])
    assert torch.equal(new["gate"], new["up"])


def test_a_layer_that_no_data_was_seen_at_stays() -> None:
    graph = canonical(PreNorm(), TOKENS)
    result = run_passes(graph, [SmoothActivations({})])
    assert not result.log[-1].changed
    assert any(note.reason.endswith("no data was seen at qkv") for note in result.log[-1].notes)


def test_a_strength_beyond_one_is_refused() -> None:
    with pytest.raises(PassError, match=r"smooth_activations: the strength 1.5 is not in 0 to 1"):
        run_passes(canonical(PreNorm(), TOKENS), [SmoothActivations({}, 1.5)])
