"""A float model with an encodings file computes what was trained, once the encodings are applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from default_sessions import NETWORKS
from onnx import TensorProto
from other_forms import run, with_encodings_applied
from torch import Tensor, nn

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import export


class Words(nn.Module):
    """A table of embeddings, and a layer that reads its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.table(x)).mean(1))
        return y


def written(
    model: nn.Module, inputs: tuple[Any, ...], bits: str, folder: Path
) -> tuple[Any, onnx.ModelProto, dict[str, Any]]:
    program = build_program(model.eval(), inputs, {"preset": bits})
    example = program.traced.call.flatten(inputs, {})
    calibrate(program.student, [example], method="minmax")
    lowered = lower(program.student).graph_module
    made = export(program, lowered, folder / "model.qnn.onnx", target="qnn")
    encodings = json.loads((folder / "model.qnn.encodings").read_text("utf-8"))
    expected = lowered(*example)
    leaf = torch.utils._pytree.tree_leaves(expected)[0]
    return (example, leaf.detach().numpy()), onnx.load(made.path), encodings


CASES = [
    ("residual", "w8a8"),
    ("residual", "w4a4"),
    ("attention by hand", "w8a8"),
    ("u-net", "w4a8"),
    ("shared", "w8a8"),
    ("words", "w8a8"),
]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_with_its_encodings_applied_it_is_the_student(name: str, bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = (
        (Words(), (torch.arange(22).reshape(2, 11) % 11,)) if name == "words" else NETWORKS[name]()
    )
    (example, expected), model, encodings = written(*made, bits, tmp_path)
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    assert {x.data_type for x in model.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    got = run(with_encodings_applied(model, encodings), example)
    assert np.allclose(got, expected, atol=1e-4)


def test_weights_of_four_bits_say_so_and_names_are_those_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, model, encodings = written(*NETWORKS["residual"](), "w4a4", tmp_path)
    assert encodings["version"] == "1.0.0"
    bits = [one["bw"] for one in encodings["param_encodings"]]
    assert set(bits) == {4, 8}
    known = {name for node in model.graph.node for name in (*node.input, *node.output)}
    for one in encodings["activation_encodings"] + encodings["param_encodings"]:
        assert one["name"] in known
        assert len(one["scale"]) == len(one["offset"])
