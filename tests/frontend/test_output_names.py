"""Outputs have the names that the model's own code gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.errors import RecipeError
from sqakd_fx.frontend.trace import trace
from sqakd_fx.ir import meta
from sqakd_fx.program import build_program
from sqakd_fx.stages import check_outputs
from sqakd_fx.training.losses import distillation_loss

ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Parts(NamedTuple):
    boxes: Tensor
    scores: Tensor


@dataclass
class Fields:
    boxes: Tensor
    scores: Tensor
    loss: Tensor | None = None


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Linear(6, 4), nn.Linear(6, 3)


class Variables(Heads):
    def forward(self, x: Tensor) -> Any:
        def inner(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a, b

        left, right = inner(self.boxes(x), self.scores(x))
        return left, right


class Calls(Heads):
    def forward(this, x: Tensor) -> Any:
        return this.boxes(x).relu(), this.scores(x)


class Branches(Heads):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self.boxes(x)
        boxes = self.boxes(x)
        return boxes, [self.scores(x), self.scores(x) * 2]


class Keys(Heads):
    def forward(self, x: Tensor) -> Any:
        return {"b": self.boxes(x), "more": {"s\n": self.scores(x)}, "more_s_": x * 2, "": x + 1}


class Named(Heads):
    def forward(self, x: Tensor) -> Any:
        return Parts(self.boxes(x), self.scores(x))


class Structured(Heads):
    def forward(self, x: Tensor) -> Any:
        return Fields(self.boxes(x), self.scores(x))


class OfInputs(Heads):
    def forward(self, x: Tensor) -> Any:
        boxes = self.boxes(x)
        x = self.scores(x)
        return boxes, x


class Unnamed(Heads):
    def forward(self, x: Tensor) -> Any:
        return self.boxes(x) + 1, self.scores(x)


class One(Heads):
    def forward(self, x: Tensor) -> Any:
        return self.scores(x)


NAMES = {
    Variables: ("left", "right"),
    Calls: ("boxes", "scores"),
    Keys: ("b", "more_s_", "more_s__1", "output_3"),
    Named: ("boxes", "scores"),
    Structured: ("boxes", "scores"),
    OfInputs: ("output_0", "output_1"),
    Unnamed: ("output_0", "output_1"),
    One: ("output",),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_outputs_are_called_as_the_model_calls_them(kind: type[nn.Module], front_end: Any) -> None:
    traced = trace(kind(), ROWS, front_end=front_end)
    (end,) = traced.graph_module.graph.find_nodes(op="output")
    assert meta.output_names(end) == NAMES[kind]


def test_a_part_that_is_a_list_has_its_name_and_a_number() -> None:
    traced = trace(Branches(), ROWS)
    (end,) = traced.graph_module.graph.find_nodes(op="output")
    assert meta.output_names(end) == ("output_0", "output_1", "output_2")


def test_a_recipe_names_an_output_as_the_file_does_or_by_its_number() -> None:
    for name in ("left", "output_0"):
        program = build_program(Variables(), ROWS, {"preset": "w4a4", "loss": {name: "none"}})
        check_outputs(program)
        assert (program.outputs[0].name, program.outputs[0].loss) == ("left", "none")
        loss = distillation_loss(program.recipe)
        right = torch.zeros(4, 3)
        assert float(loss((ROWS, right), (ROWS * 9, right))) == 0


def test_a_later_glob_does_not_win_over_what_was_said_of_a_name() -> None:
    recipe = {"preset": "w4a4", "loss": {"left": "none", "*": "mse"}}
    program = build_program(Variables(), ROWS, recipe)
    again = build_program(Variables(), ROWS, program.recipe)
    assert [one.loss for one in program.outputs] == ["none", "mse"]
    assert [one.loss for one in again.outputs] == ["none", "mse"]


def test_an_output_that_the_model_has_not_is_told_with_the_names_of_those_it_has() -> None:
    program = build_program(Variables(), ROWS, {"preset": "w4a4", "loss": {"center": "none"}})
    with pytest.raises(RecipeError, match="its outputs are left, right"):
        check_outputs(program)
