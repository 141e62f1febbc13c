"""Models in forms that were not written for the compiler, each from trace to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common_models import (
    MODELS,
    ROWS,
    DataDependent,
    compiled,
)
from torch import Tensor, nn

from sqakd_fx.errors import TraceError
from sqakd_fx.frontend.trace import trace
from sqakd_fx.ir.outputs import largest_difference, tensors_of
from sqakd_fx.program import build_program, layer_facts
from sqakd_fx.recipe.resolution import resolve_recipe


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2", "w1a1"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_through_whole(name: str, bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, args, kwargs, layers = MODELS[name]
    model = make().eval()
    program, checked = compiled(model, args, kwargs, bits, tmp_path)
    assert checked.failures == ()
    assert len(layer_facts(program.student)) == layers


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_through_packed(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, args, kwargs, _ = MODELS[name]
    _, checked = compiled(make().eval(), args, kwargs, "w2a2", tmp_path, "packed")
    assert checked.failures == ()


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("half", "data-dependent")])
def test_the_traced_graph_is_the_model_at_other_batch_sizes_too(name: str, front_end: str) -> None:
    torch.manual_seed(0)
    make, args, kwargs, _ = MODELS[name]
    model = make().eval()
    found = trace(model, args, example_kwargs=kwargs, front_end=front_end)  # type: ignore[arg-type]

    def resized(x: Any) -> Any:
        return torch.cat([x.flip(0), x[:1]]) if isinstance(x, Tensor) else x

    args, kwargs = torch.utils._pytree.tree_map(resized, (args, kwargs))
    with torch.no_grad():
        wanted = tensors_of(model(*args, **kwargs))
        got = tensors_of(found.graph_module(*found.call.flatten(args, kwargs)))
    assert largest_difference(wanted, got) <= 1e-5
    assert found.front_end == front_end


def test_what_cannot_be_traced_is_an_island_with_the_line_of_the_users_code() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while x.abs().max() > 1:  # the line
                x = x / 2
            return x

    model = nn.Sequential(nn.Linear(6, 6), Loop(), nn.Linear(6, 4)).eval()
    found = trace(model, ROWS)
    assert found.decisions
    assert __file__ in found.decisions[0]


def test_a_forward_that_cannot_be_traced_names_its_line_and_a_way_out() -> None:
    class Numpy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(x.detach().numpy() * float(x.sum().item()))

    with pytest.raises(TraceError, match=rf"{__file__}:\d+.*frontend=export"):
        trace(Numpy(), ROWS, front_end="symbolic")


def test_the_recipe_keeps_a_submodule_whole_or_lets_the_example_decide(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), DataDependent()).eval()
    program = build_program(model, ROWS, resolve_recipe("w8a8", float_modules=["0"]))
    assert {fact.name for fact in layer_facts(program.student)} == {"1.a", "1.b"}
    assert "recipe keeps it" in program.notes[0].reason
    whole = build_program(model, ROWS, resolve_recipe("w8a8"))
    assert "specialize = ['1.refine']" in whole.notes[0].reason
    with pytest.raises(TraceError, match=r"did you mean 1\.refine"):
        build_program(model, ROWS, resolve_recipe("w8a8", specialize=["1.refin"]))


def test_a_submodule_that_the_recipe_keeps_whole_may_be_most_of_the_model() -> None:
    wide = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 6))
    model = nn.Sequential(nn.Linear(6, 6), wide, nn.Linear(6, 4)).eval()
    program = build_program(model, ROWS, resolve_recipe("w8a8", float_modules=["1"]))
    assert {fact.name for fact in layer_facts(program.student)} == {"0", "2"}
    with pytest.raises(TraceError, match=r"keeps no submodule whole.*float_modules name 1"):
        trace(model, ROWS, front_end="export", float_modules=["1"])
