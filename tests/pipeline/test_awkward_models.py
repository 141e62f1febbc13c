"""Models that once failed or came out wrong, and come through whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from awkward_models import (
    AWKWARD,
    HALVES,
    BroadcastEinsum,
    Einsums,
    PaddedPool,
    PartOfABias,
)
from common_models import ROWS, TOKENS, compiled

from sqakd_fx.ir.outputs import largest_difference, tensors_of
from sqakd_fx.program import build_program, layer_facts
from sqakd_fx.recipe.resolution import resolve_recipe


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_inside_a_model_is_computed_in_float32(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HALVES[name]().eval()
    program, checked = compiled(model, (ROWS,), {}, "w8a8", tmp_path)
    assert checked.failures == ()
    a, b = (layer.float() for layer in copy.deepcopy(model).children())
    with torch.no_grad():
        hidden = a(ROWS) * (0.5 if name == "half throughout" else 1.0)
        assert largest_difference([b(torch.relu(hidden))], [program.teacher(ROWS)]) <= 1e-6
        assert largest_difference([model(ROWS).float()], [program.teacher(ROWS)]) <= 1e-2


@pytest.mark.parametrize("name", AWKWARD)
def test_an_awkward_model_comes_through_whole(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x = AWKWARD[name]
    model = make().eval()
    program, checked = compiled(model, (x,), {}, "w4a4", tmp_path)
    assert checked.failures == ()
    other = torch.cat([x.flip(0), x[:1]])
    with torch.no_grad():
        wanted, got = tensors_of(model(other)), tensors_of(program.teacher(other))
    assert largest_difference(wanted, got) <= 1e-5


def test_a_pad_is_not_taken_for_the_padding_of_a_pool(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = PaddedPool().eval(), torch.randn(4, 3, 6, 6)
    _, checked = compiled(model, (x,), {}, "w8a8", tmp_path)
    assert checked.failures == ()


def test_an_einsum_that_stays_in_float_is_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, checked = compiled(BroadcastEinsum().eval(), (TOKENS,), {}, "w4a4", tmp_path)
    assert any("Einsum" in name for name in checked.fusion.float_heavy)


def test_an_einsum_with_a_weight_is_a_quantized_layer() -> None:
    program = build_program(Einsums(), TOKENS, resolve_recipe("w4a4"))
    assert [layer.operation for layer in layer_facts(program.student)] == ["linear"] * 3


def test_a_bias_of_which_a_part_is_zeroed_is_one_of_a_quantized_layer() -> None:
    program = build_program(PartOfABias(), ROWS, resolve_recipe("w8a8"))
    assert program.traced.front_end == "symbolic"
    assert [layer.operation for layer in layer_facts(program.student)] == ["linear", "linear"]
