"""Recurrent layers are one operation each while a graph is exported, whose shapes are torch's."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sqakd_fx.exporters.recurrent import RECURRENT, WholeLayers
from sqakd_fx.exporters.simplify import simplify

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
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
        torch.manual_seed(0)
        self.layer = kind(3, 4, **form)

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        if not states:
            return self.layer(x)
        return self.layer(x, states if len(states) > 1 else states[0])


def _operations(model: nn.Module, x: Tensor) -> list[str]:
    with WholeLayers():
        program = torch.export.export(model, (x,))
    return [str(n.target) for n in program.graph.nodes if "sqakd_fx_layers" in str(n.target)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
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


def _exported(model: nn.Module, *inputs: Tensor) -> ir.Model:
    with WholeLayers(), torch.no_grad():
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            opset_version=21,
            custom_translation_table=RECURRENT,
            optimize=False,
        )
    assert program is not None
    simplify(program.model, set())
    return program.model


def _assert_computes(found: ir.Model, model: nn.Module, *inputs: Tensor) -> None:
    """The same outputs and last states in ONNX Runtime, to float32 rounding."""
    session = ort.InferenceSession(ir.to_proto(found).SerializeToString())
    names = [one.name for one in session.get_inputs()]
    results = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(*inputs))
    for result, tensor in zip(results, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(result), tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_one_operator_for_each_of_its_layers(
    kind: type[nn.RNNBase], form: dict[str, Any]
) -> None:
    model, x = Layer(kind, **form).eval(), torch.randn(5, 2, 3)
    found = _exported(model, x)
    (*layers,) = (node for node in found.graph if node.op_type == kind.__name__)
    assert len(layers) == form.get("num_layers", 1)
    assert all(len(node.inputs) <= 4 for node in layers)  # no states, which would be zeros
    assert not {node.op_type for node in found.graph} - {
        kind.__name__,
        *("Transpose", "Squeeze", "Reshape", "Concat"),
    }
    _assert_computes(found, model, x)


def test_a_layer_of_relu_is_one_of_relu() -> None:
    model = Layer(nn.RNN, nonlinearity="relu", bidirectional=True).eval()
    x = torch.randn(5, 2, 3)
    _assert_computes(_exported(model, x), model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_given_states_are_read(kind: type[nn.RNNBase]) -> None:
    model, x = Layer(kind, num_layers=2, bidirectional=True).eval(), torch.randn(5, 2, 3)
    states = [torch.randn(4, 2, 4) for _ in range(2 if kind is nn.LSTM else 1)]
    _assert_computes(_exported(model, x, *states), model, x, *states)
