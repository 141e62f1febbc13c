"""LSTM, GRU and RNN compute in float; their weights are stored in INT8 with a scale for each row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from common_models import compiled
from torch import Tensor, nn

from sqakd_fx import quantize
from sqakd_fx.ir.recurrent_layers import as_function
from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.resolution import resolve_recipe

SEQUENCES = torch.randn(4, 7, 6)


class Reads(nn.Module):
    """A recurrent layer, of whose outputs `read` takes some."""

    def __init__(self, layer: nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.rnn, self.read = layer, read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.rnn(x))


class Whole(nn.Module):
    """What the layer gives is given as it is, sequences first."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)


class GivenStates(nn.Module):
    """Two layers, of which the second begins with the states of the first."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.one, self.two = kind(6, 8, batch_first=True), kind(8, 8, batch_first=True)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Any:
        y, states = self.one(x)
        return self.two(y, states)[0]


class TwoCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0] + self.rnn(x.flip(1))[0]  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm, last step": lambda: Reads(nn.LSTM(6, 8, batch_first=True), lambda r: r[0][:, -1]),
    "lstm, cell state": lambda: Reads(nn.LSTM(6, 8, batch_first=True), lambda r: r[1][1][-1]),
    "lstm, from the end": lambda: Reads(
        nn.LSTM(6, 8, batch_first=True), lambda r: r[-2][:, 0] + r[-1][0][-1]
    ),
    "lstm, all": lambda: Reads(
        nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True),
        lambda r: (r[0], r[1][0].transpose(0, 1)),
    ),
    "lstm, both states": lambda: Reads(
        nn.LSTM(6, 8, batch_first=True), lambda r: torch.cat(r[1], 2)[0]
    ),
    "gru": lambda: Reads(
        nn.GRU(6, 8, 2, bias=False, batch_first=True), lambda r: r[0][:, 0] + r[1][-1]
    ),
    "tanh": lambda: Reads(nn.RNN(6, 8, batch_first=True), lambda r: r[0]),
    "relu": lambda: Reads(
        nn.RNN(6, 8, 2, nonlinearity="relu", batch_first=True, dropout=0.3), lambda r: r[1].mean(0)
    ),
    "lstm with given states": lambda: GivenStates(nn.LSTM),
    "gru with given states": lambda: GivenStates(nn.GRU),
    "two calls": TwoCalls,
}


def flat(values: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", [*MODELS, "whole"])
def test_the_function_gives_what_the_module_gives(name: str) -> None:
    torch.manual_seed(0)
    model = (MODELS | {"whole": Whole})[name]().eval()
    traced = torch.fx.Tracer().trace(model)
    graph_module = torch.fx.GraphModule(model, traced)
    for node in list(graph_module.graph.find_nodes(op="call_module")):
        as_function(graph_module, node)
    graph_module.graph.lint()
    graph_module.recompile()
    for batch in (SEQUENCES, torch.randn(2, 7, 6)):
        for got, wanted in zip(flat(graph_module(batch)), flat(model(batch)), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_is_the_student_and_holds_the_weights_in_int8(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    program, checked = compiled(model, (SEQUENCES,), {}, "w8a8", tmp_path)
    assert checked.failures == ()
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2}
    assert {n.removesuffix("_quantizer") for n in quantizers_of(program.student)} >= matrices
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in stored}
    assert {arrays[n].dtype for n in matrices} == {np.dtype(np.int8)}
    assert not [n for n, a in arrays.items() if a.dtype == np.float32 and a.size >= 8 * 24]


def test_a_packed_file_is_the_student_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["lstm, all"]().eval()
    _, checked = compiled(model, (SEQUENCES,), {}, "w4a4", tmp_path, "packed")
    assert checked.failures == ()


def test_the_weights_cost_the_output_less_than_a_percent() -> None:
    torch.manual_seed(0)
    model = MODELS["lstm, all"]().eval()
    program = build_program(model, SEQUENCES, "w8a8")
    calibrate(program.student, [(SEQUENCES,)])
    got, wanted = flat(program.student(SEQUENCES))[0], flat(model(SEQUENCES))[0]
    assert 0 < float((got - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize(
    ("model", "inputs", "settings"),
    [
        (MODELS["lstm, all"](), SEQUENCES, {"recurrent_weights": "float"}),
        (Reads(nn.LSTM(6, 8), lambda r: r[0]), torch.randn(7, 6), {}),
    ],
    ids=["by recipe", "without a batch"],
)
def test_a_layer_stays_in_float(model: nn.Module, inputs: Tensor, settings: dict[str, Any]) -> None:
    program = build_program(model.eval(), inputs, resolve_recipe("w8a8", **settings))
    assert not [n for n in quantizers_of(program.student) if "weight" in n]
    assert any(n.op == "call_module" for n in program.student.graph.nodes)


class Loud(nn.Module):
    """A layer whose first input is a thousandth of the others, and counts as much."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, 2, batch_first=True)
        with torch.no_grad():
            self.rnn.weight_ih_l0[:, 0] *= 1000
        self.register_buffer("sizes", torch.tensor([1e-3, 1, 1, 1, 1, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x * self.sizes)[0][:, -1]  # type: ignore[no-any-return]


def test_a_weight_that_8_bits_harm_stays_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    done = quantize(
        Loud().eval(),
        torch.randn(64, 7, 6),
        example_inputs=SEQUENCES[:2],
        recipe={"preset": "w8a8", "steps": 0, "tolerance": 0.03},
        out=tmp_path / "out",
        progress=False,
    )
    assert done is not None
    stored = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    kinds = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in stored}
    assert kinds["rnn.weight_hh_l0"] == kinds["rnn.weight_ih_l1"] == "INT8"
    assert "rnn.weight_ih_l0" not in {n for n, kind in kinds.items() if kind == "INT8"}
    recipe = (tmp_path / "out" / "recipe.toml").read_text()
    assert 'match = "rnn.weight_ih_l0"' in recipe
    assert "8 bits here alone cost the outputs" in recipe


@pytest.mark.parametrize("match", ["rnn", "lstm", "rnn.weight_hh*"])
def test_an_override_leaves_weights_in_float(match: str) -> None:
    settings = {"override": ({"match": match, "float": True},)}
    model = MODELS["lstm, all"]().eval()
    program = build_program(model, SEQUENCES, {"preset": "w8a8", **settings})
    kept = {n.split("_")[1] for n in quantizers_of(program.student) if "weight" in n}
    assert kept == ({"ih"} if "weight" in match else set())
