"""Recurrent layers are one operation each while a graph is exported, whose shapes are torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sqakd_fx.exporters.recurrent import WholeLayers

FORMS = [
    {},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False},
]


class Layer(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **form: Any) -> None:
        super().__init__()
        self.layer = kind(3, 4, **form)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def _operations(model: nn.Module, x: Tensor) -> list[str]:
    with WholeLayers():
        program = torch.export.export(model, (x,))
    return [str(n.target) for n in program.graph.nodes if "sqakd_fx_layers" in str(n.target)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_shapes_are_those_that_torch_computes(kind: type[nn.RNNBase], form: dict[str, Any]) -> None:
    layer, x = kind(3, 4, **form).eval(), torch.randn(5, 2, 3)
    wanted = torch.utils._pytree.tree_leaves(layer(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, WholeLayers():
        found = torch.utils._pytree.tree_leaves(layer(fake.from_tensor(x)))
    assert [y.shape for y in found] == [y.shape for y in wanted]
    assert [y.dtype for y in found] == [y.dtype for y in wanted]


def test_a_projected_lstm_has_states_of_two_sizes() -> None:
    layer, x = nn.LSTM(3, 4, proj_size=2).eval(), torch.randn(5, 2, 3)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, WholeLayers():
        y, (h, c) = layer(fake.from_tensor(x))
    assert [tuple(one.shape) for one in (y, h, c)] == [(5, 2, 2), (1, 2, 2), (1, 2, 4)]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_layer_of_many_steps_is_one_operation(kind: type[nn.RNNBase]) -> None:
    assert len(_operations(Layer(kind).eval(), torch.randn(300, 2, 3))) == 1


def test_what_computes_with_the_operations_computes_what_the_layers_do() -> None:
    layer, x = nn.GRU(3, 4, 2, bidirectional=True).eval(), torch.randn(5, 2, 3)
    wanted, _ = layer(x)
    with WholeLayers(), torch.no_grad():
        found, _ = layer(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_packed_sequences_stay_torchs() -> None:
    layer = nn.GRU(3, 4).eval()
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    wanted, _ = layer(packed)
    with WholeLayers():
        found, _ = layer(packed)
    torch.testing.assert_close(found.data, wanted.data, rtol=0, atol=0)
