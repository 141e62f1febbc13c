"""Convolutions with groups are lowered to forms that are fast and have the same sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate

CONV = torch.ops.sqakd_fx.conv.default


def lowered(layer: nn.Module, x: Tensor, recipe: Any = "w8a8") -> tuple[fx.GraphModule, Tensor]:
    """The integer program of a layer between two activations, and what the student gives."""
    torch.manual_seed(0)
    program = build_program(nn.Sequential(layer, nn.ReLU()).eval(), x, recipe)
    calibrate(program.student, [(x,)])
    with torch.no_grad():
        return lower(program.student).graph_module, program.student(x)


def convolution(graph_module: fx.GraphModule) -> fx.Node:
    (found,) = graph_module.graph.find_nodes(op="call_function", target=CONV)
    return found


torch.manual_seed(0)  # of the weights below


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 12, 3, groups=4), (2, 4, 9)),
        (nn.Conv2d(4, 8, 3, 2, 1, groups=4), (2, 4, 9, 9)),
        (nn.Conv2d(1, 6, 3), (2, 1, 9, 9)),
        (nn.Conv3d(2, 4, 3, groups=2), (2, 2, 5, 5, 5)),
        (nn.ConvTranspose2d(6, 6, 4, 2, 1, groups=6), (2, 6, 5, 5)),
        (nn.ConvTranspose2d(6, 6, (3, 2), (1, 2), groups=6), (2, 6, 5, 5)),
        (nn.ConvTranspose2d(3, 4, 3, (3, 2), 1, 1), (2, 3, 5, 5)),
        (nn.ConvTranspose1d(4, 4, 3, 3, groups=4), (2, 4, 5)),
        (nn.ConvTranspose3d(2, 2, 2, (2, 1, 2), groups=2), (2, 2, 3, 3, 3)),
        (nn.Conv2d(32, 16, 3, groups=8), (2, 32, 6, 6)),
        (nn.Conv2d(6, 6, 3, groups=3), (2, 6, 6, 6)),
        (nn.Conv1d(20, 40, 1, groups=5), (2, 20, 6)),
    ],
)
def test_the_program_gives_what_the_trained_layer_gives(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    program, wanted = lowered(layer, x)
    with torch.no_grad():
        got = program(x)
    assert torch.allclose(got, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_with_a_channel_multiplier_each_channel_is_read_once_for_each_output() -> None:
    """32 outputs of 8 channels: the runtime has a quick kernel for one output a channel."""
    program, _ = lowered(nn.Conv2d(8, 32, 3, groups=8), torch.randn(2, 8, 6, 6))
    assert convolution(program).args[-1] == 32
    (repeated,) = program.graph.find_nodes(op="call_function", target=torch.index_select)
    channels = program.get_buffer(repeated.args[2].target)
    assert channels.tolist() == [c for c in range(8) for _ in range(4)]


@pytest.mark.parametrize(
    ("channels", "groups", "joined"), [(32, 8, 2), (64, 16, 4), (64, 4, 4), (6, 3, 1), (24, 6, 1)]
)
def test_groups_are_joined_until_they_have_16_channels(
    channels: int, groups: int, joined: int
) -> None:
    """Between channels that were apart weights are 0."""
    program, _ = lowered(
        nn.Conv2d(channels, channels, 1, groups=groups), torch.randn(2, channels, 4, 4)
    )
    node = convolution(program)
    codes = program.get_buffer(node.args[3].target)
    assert node.args[-1] == joined
    assert codes.shape[1] == channels // joined
    inside = channels // groups
    assert int((codes != 0).flatten(1).sum(1).max()) <= inside


def test_weights_of_one_bit_have_no_zero_to_join_groups_with() -> None:
    recipe = {"preset": "w1a1", "first_last": "same"}
    program, _ = lowered(nn.Conv2d(32, 32, 1, groups=8), torch.randn(2, 32, 4, 4), recipe)
    assert convolution(program).args[-1] == 8
    assert set(program.get_buffer(convolution(program).args[3].target).unique().tolist()) == {-1, 1}


def test_plain_depthwise_and_dense_layers_stay_as_they_are() -> None:
    for layer in (nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3)):
        program, _ = lowered(layer, torch.randn(2, 8, 6, 6))
        assert convolution(program).args[-1] == layer.groups
        assert not program.graph.find_nodes(op="call_function", target=torch.index_select)
