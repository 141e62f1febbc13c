"""Recipes: what a setting changes of a preset."""

from __future__ import annotations

from pathlib import Path

from sqakd_fx.recipe import resolve_recipe


def test_ewgs_and_qil_train_their_ranges_slowly_unless_told_otherwise() -> None:
    def rate(preset: str, *settings: str) -> float:
        return resolve_recipe(preset, settings=settings).quantizer_learning_rate

    assert rate("w4a4", "weight_family=ewgs") == rate("w4a4", "activation_family=ewgs") == 1e-5
    assert rate("w4a4", "weight_family=qil") == 1e-5
    assert rate("w4a4", "weight_family=ewgs", "quantizer_learning_rate=0.5") == 0.5
    assert rate("w4a4") == 1e-3
    assert rate("w1a1") == rate("w2a2", "weight_family=ewgs") == 1e-2


def test_the_decay_of_a_preset_goes_with_its_optimizer(tmp_path: Path) -> None:
    def decay(preset: str, *settings: str) -> float:
        return resolve_recipe(preset, settings=settings).weight_decay

    assert decay("w2a2") == decay("w2a2", "optimizer=adamw") == 0.2
    assert decay("w2a2", "optimizer=adam") == decay("w2a2", "optimizer=sgd") == 0.0
    assert decay("w2a2", "optimizer=sgd", "weight_decay=1e-4") == 1e-4
    assert decay("paper/lsq-w2a2", "optimizer=adam") == 5e-4
    file = tmp_path / "recipe.toml"
    file.write_text('preset = "w2a2"\noptimizer = "sgd"\n')
    assert resolve_recipe(file).weight_decay == 0.0
