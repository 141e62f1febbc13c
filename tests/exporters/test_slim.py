"""A packed file is small, and every value in it has a name of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from common_models import compiled
from torch import Tensor, nn

from sqakd_fx.exporters.slim import slim
from sqakd_fx.runtime.session import session


def text_model(text: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def outputs_of(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})


def test_outputs_of_one_node_keep_names_of_their_own() -> None:
    model = text_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 4] x) => (float[2, 4] y) {
            left, right = Split<axis = 1, num_outputs = 2>(x)
            y = Concat<axis = 1>(right, left)
        }""")
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    slim(model)
    assert (outputs_of(model, x)[0] == x[:, [2, 3, 0, 1]]).all()


def test_stored_tensors_that_have_short_names_already_are_all_kept() -> None:
    model = text_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y) <float[2] c1 = {1, 2}, float[2] c0 = {3, 5}> {
            z = Mul(x, c1)
            y = Add(z, c0)
        }""")
    slim(model)
    assert outputs_of(model, np.ones(2, np.float32))[0].tolist() == [4, 7]


def test_values_of_a_branch_keep_names_of_their_own() -> None:
    model = text_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x, bool b) => (float[2] y) {
            n = Neg(x)
            m = Abs(n)
            y = If (b) <
                then_branch = one () => (float[2] t1) { t1 = Add(n, m) },
                else_branch = two () => (float[2] t2) { t2 = Sub(n, m) }
            >
        }""")
    slim(model)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


class Halves(nn.Module):
    """Operations of several outputs whose places change in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat(self.first(x).chunk(2, 1)[::-1], 1)
        left, right = (x - x.mean(1, keepdim=True)).chunk(2, 1)
        return self.second(torch.cat([right, left], 1))


def test_halves_that_change_places_come_through_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 6, 5, 5)
    _, checked = compiled(Halves().eval(), (images,), {}, "w4a4", tmp_path, "packed")
    assert checked.failures == ()
    assert session(tmp_path / "model.onnx").get_outputs()[0].shape == ["batch", 4, 3, 3]
