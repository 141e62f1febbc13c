"""Generating models: a cache beside the outputs is left out, and said."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common_models import ROWS
from torch import Tensor, nn

from sqakd_fx.frontend.trace import FrontEnd, trace
from sqakd_fx.program import build_program


class KeyCache:
    """Keys of earlier calls, in a class that torch does not know."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


@dataclass
class Generated:
    logits: Tensor
    past_key_values: tuple[tuple[Tensor, Tensor], ...] | None = None


class Generator(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.form = form
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, x: Tensor) -> Any:
        keys = self.a(x)
        y = self.b(keys)
        if not self.config.use_cache:
            return {"logits": y} if self.form == "dict" else Generated(y)
        if self.form == "dict":
            return {"logits": y, "cache": KeyCache(keys)}
        return Generated(y, ((keys, keys),)) if self.form == "dataclass" else (y, KeyCache(keys))


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize(
    ("form", "name"),
    [("dict", "cache"), ("dataclass", "past_key_values"), ("tuple", "KeyCache")],
)
def test_a_cache_is_no_output(form: str, name: str, front_end: FrontEnd) -> None:
    model = Generator(form).eval()
    if form == "tuple":
        model.config.use_cache = "yes"
    traced = trace(model, ROWS, front_end=front_end)
    assert traced.left_out == (name,)
    with torch.no_grad():
        got = torch.utils._pytree.tree_leaves(traced.graph_module(ROWS))
        assert [x.shape for x in got if x is not None] == [(len(ROWS), 4)]
        wanted = model(ROWS)
    assert model.config.use_cache  # as it was
    logits = wanted[0] if form == "tuple" else getattr(wanted, "logits", None)
    torch.testing.assert_close(got[0], wanted["logits"] if logits is None else logits)


def test_what_is_left_out_is_a_note() -> None:
    program = build_program(Generator("dict"), ROWS, "w8a8")
    assert [n.reason for n in program.notes if n.node == "cache"] == [
        "is a cache, and no output of the file: each call computes every position"
    ]


def test_a_hook_of_the_model_itself_belongs_to_the_graph() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval()
    model.register_forward_hook(lambda module, args, out: 2 * out)
    traced = trace(model, ROWS)
    with torch.no_grad():
        torch.testing.assert_close(traced.graph_module(ROWS), model(ROWS))
    assert traced.front_end == "symbolic"
