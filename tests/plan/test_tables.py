"""Tables of embeddings are INT8 rows with a scale each, gathered as codes; a tied one is stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from common_models import compiled
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.resolution import resolve_recipe

IDS = torch.tensor([[1, 5, 49], [0, 7, 7]])


class Tied(nn.Module):
    """A language model in small: the table is the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 8, padding_idx=0), nn.LayerNorm(8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.table(ids)))  # type: ignore[no-any-return]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 8) * torch.linspace(0.01, 9, 50)[:, None])
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.embedding(ids, self.table).mean(1))  # type: ignore[no-any-return]


class Renormalizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8, max_norm=1.0), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))  # type: ignore[no-any-return]


def initializers(folder: Path) -> dict[str, np.ndarray]:
    proto = onnx.load(str(folder / "model.onnx"))
    return {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}


@pytest.mark.parametrize("profile", ["container", "packed"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_a_tied_table_is_stored_once(bits: str, profile: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, checked = compiled(Tied().eval(), (IDS,), {}, bits, tmp_path, profile)
    assert checked.failures == ()
    big = [a for a in initializers(tmp_path).values() if a.size >= 400]
    assert [(a.dtype, a.shape) for a in big] == [(np.dtype(np.int8), (50, 8))]


def test_every_row_has_a_scale_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    program, checked = compiled(model, (IDS,), {}, "w8a8", tmp_path)
    assert checked.failures == ()
    lowered = lower(program.student).graph_module
    (look_up,) = [n for n in lowered.graph.nodes if "look_up" in str(n.target)]
    codes, scale = (lowered.get_buffer(str(n.target)) for n in look_up.args[1:])
    assert codes.dtype is torch.int8
    error = (codes.float() * scale[:, None] - model.table).abs().amax(1)
    assert (error <= model.table.abs().amax(1) / 200).all()


def test_a_recipe_keeps_tables_in_float(tmp_path: Path) -> None:
    program = build_program(Tied().eval(), (IDS,), resolve_recipe("w8a8", embeddings="float"))
    calibrate(program.student, [(IDS,)])
    assert any("embedding is computed in float" in note.reason for note in program.notes)
    assert not any("table" in n.meta for n in program.student.graph.nodes)


def test_a_table_that_changes_while_it_is_read_stays_in_float() -> None:
    program = build_program(Renormalizing().eval(), (IDS,), resolve_recipe("w8a8"))
    assert not any("table" in n.meta for n in program.student.graph.nodes)


def test_a_table_of_positions_is_no_look_up_of_the_users_data() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(20, 8), nn.Embedding(12, 8)
            self.register_buffer("ids", torch.arange(12)[None])
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x) + self.places(self.ids[:, : x.shape[1]]))

    program = build_program(Positions(), torch.randint(0, 20, (2, 5)), "w8a8")
    tables = [name for name in quantizers_of(program.student) if "table" in name]
    assert tables == ["words.weight_table_quantizer"]
