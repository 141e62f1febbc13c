"""Sensitivity is what it says, and the bits under a budget are the best there are."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sqakd_fx.errors import RecipeError
from sqakd_fx.mixed_precision.budget import choose_bits, parse_budget, totals, with_bits
from sqakd_fx.mixed_precision.sensitivity import (
    LayerSensitivity,
    measure_sensitivity,
    passes_needed,
)
from sqakd_fx.program import build_program, layer_facts, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe.resolution import resolve_recipe, to_toml
from sqakd_fx.results.export import export


def test_the_divergence_is_the_kl_of_a_model_with_that_layer_quantized(
    residual_net: nn.Module, images: Tensor
) -> None:
    recipe = resolve_recipe("w3a3", settings=["initialization=minmax"])
    program = build_program(residual_net, images, recipe)
    found = {
        layer.name: layer
        for layer in measure_sensitivity(program, recipe, [(images,)], candidates=[2])
    }
    name = "layers.1.conv2"
    model = copy.deepcopy(residual_net)
    conv = model.get_submodule(name)
    weight = Quantizer("lsq", "weight", 2, channels=conv.weight.shape[0], axis=0)
    weight.initialize(conv.weight, "minmax")
    conv.weight.data = weight(conv.weight).detach()
    activation = Quantizer("lsq", "activation", 3)

    def quantize_input(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        activation.initialize(inputs[0], "minmax")
        return activation(inputs[0])

    conv.register_forward_pre_hook(quantize_input)
    with torch.no_grad():
        p = F.log_softmax(residual_net(images).double(), dim=1)
        q = F.log_softmax(model(images).double(), dim=1)
    kl = float((p.exp() * (p - q)).sum(dim=1).mean())
    assert found[name].divergence[2] == pytest.approx(kl, rel=1e-4)
    assert set(found) == {fact.name for fact in layer_facts(program.student)}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.lists(st.floats(0, 9), min_size=3, max_size=3)),
        min_size=1,
        max_size=5,
    ),
    st.floats(0, 1),
)
def test_the_choice_is_as_good_as_trying_every_combination(
    shapes: list[tuple[int, list[float]]], tightness: float
) -> None:
    widths = (2, 4, 8)
    layers = [
        LayerSensitivity(
            f"l{i}", n, n, 4, "recipe w4a4", dict(zip(widths, divergence, strict=True))
        )
        for i, (n, divergence) in enumerate(shapes)
    ]
    total = sum(layer.parameters for layer in layers)
    limit = 2 + 6 * tightness
    chosen = choose_bits(layers, parse_budget(f"bits={limit!r}"))
    assert sum(layer.parameters * chosen[layer.name] for layer in layers) <= total * limit * (
        1 + 1e-6
    )
    possible = [
        sum(layer.divergence[b] for layer, b in zip(layers, bits, strict=True))
        for bits in itertools.product(widths, repeat=len(layers))
        if sum(layer.parameters * b for layer, b in zip(layers, bits, strict=True)) <= total * limit
    ]
    got = sum(layer.divergence[chosen[layer.name]] for layer in layers)
    assert got <= min(possible) + 1e-6


def test_a_budget_writes_overrides_that_the_program_follows(
    residual_net: nn.Module, images: Tensor
) -> None:
    recipe = resolve_recipe("w4a4")
    program = build_program(residual_net, images, recipe)
    layers = measure_sensitivity(program, recipe, [(images,)], candidates=[2, 3])
    chosen = choose_bits(layers, parse_budget("bits=3"))
    mixed = build_program(residual_net, images, with_bits(recipe, layers, chosen))
    assert {fact.name: fact.weight_bits for fact in layer_facts(mixed.student)} == chosen
    assert chosen["conv"] == chosen["fc"] == 8


@pytest.mark.parametrize("budget", ["bits=3.2", "size=2800B"])
def test_the_exported_file_keeps_the_budget_and_has_the_promised_size(
    residual_net: nn.Module, images: Tensor, budget: str, tmp_path: Path
) -> None:
    recipe = resolve_recipe("w4a4", profile="container")
    program = build_program(residual_net, images, recipe)
    layers = measure_sensitivity(program, recipe, [(images,)], candidates=[2, 3, 4, 8])
    chosen = choose_bits(layers, parse_budget(budget))
    path = tmp_path / "mixed.toml"
    path.write_text(to_toml(with_bits(recipe, layers, chosen)))
    mixed = resolve_recipe(path)
    program = build_program(residual_net, images, mixed)
    calibrate(program.student, [(images,)], method="minmax")
    lowered = lower(program.student).graph_module
    exported = export(program, lowered, tmp_path / "model.onnx")
    facts = layer_facts(program.student)
    mean, size = totals(layers, chosen)
    weights = sum(fact.parameters for fact in facts)
    bits = sum(fact.parameters * (fact.weight_bits or 0) for fact in facts)
    assert bits / weights == pytest.approx(mean)
    assert sum(weight.size for weight in exported.weights) == size
    assert mean <= 3.2 if budget.startswith("bits") else size <= 2800


def test_measuring_recomputes_only_what_stands_behind_a_layer(
    residual_net: nn.Module, images: Tensor
) -> None:
    recipe = resolve_recipe("w4a4")
    program = build_program(residual_net, images, recipe)
    layers = measure_sensitivity(program, recipe, [(images,)])
    total = sum(layer.macs for layer in layers)
    with FlopCounterMode(display=False) as counter:
        measure_sensitivity(program, recipe, [(images,)])
    assert counter.get_total_flops() / 2 / total == pytest.approx(passes_needed(program), rel=1e-6)
    assert passes_needed(program) < 0.7 * (1 + len(layers))


@pytest.mark.parametrize("text", ["bits", "bit=3", "bits=3MB", "size=3", "size=3XB", "bits=1.2.3"])
def test_a_budget_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--budget"):
        parse_budget(text)


def test_a_budget_that_nothing_meets_says_the_least_that_does() -> None:
    layer = LayerSensitivity("fc", 1000, 1000, 4, "recipe w4a4", {2: 1.0, 4: 0.5})
    with pytest.raises(RecipeError, match="below 250"):
        choose_bits([layer], parse_budget("size=200B"))
