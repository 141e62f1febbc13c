"""Recipes: what a setting changes of a preset."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqakd_fx.errors import RecipeError
from sqakd_fx.recipe.resolution import resolve_recipe


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


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ('islands=["layers.0"]', "float_modules", ("layers.0",)),
        ('decided=["head"]', "specialize", ("head",)),
        ("thresholds=channel", "activation_affine", "channel"),
        ("thresholds=tensor", "activation_affine", "none"),
        ("initialisation=percentile", "initialization", "percentile"),
    ],
)
def test_a_key_of_an_earlier_version_is_read_under_its_name_with_a_note(
    old: str, new: str, value: object, tmp_path: Path
) -> None:
    key = old.partition("=")[0]
    with pytest.warns(FutureWarning, match=f"{key!r} is read as {new!r}"):
        assert getattr(resolve_recipe("w4a4", settings=[old]), new) == value
    file = tmp_path / "recipe.toml"
    file.write_text(old if "[" in old else '{} = "{}"'.format(*old.split("=")))
    with pytest.warns(FutureWarning):
        assert getattr(resolve_recipe(file), new) == value


def test_an_old_name_beside_the_new_one_is_refused() -> None:
    with pytest.raises(RecipeError, match="has both 'islands' and 'float_modules'"):
        resolve_recipe("w4a4", settings=['islands=["a"]', 'float_modules=["b"]'])


@pytest.mark.parametrize("value", [0, -1.0, "much"])
def test_a_key_of_several_types_is_named_as_it_is_written(value: object) -> None:
    with pytest.raises(RecipeError, match=r"the recipe's tolerance = "):
        resolve_recipe("w8a8", tolerance=value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("int8", "w8a8"), ("INT8", "w8a8"), ("uint8", "w8a8"), ("8", "w8a8"), ("8-bit", "w8a8"),
        ("4bits", "w4a4"), ("int4", "w4a4"), ("W4A8", "w4a8"), ("a8w4", "w4a8"), ("4/8", "w4a8"),
        ("w4", "w4a8"), ("w4-a8", "w4a8"), ("i2", "w2a2"),
    ],
)  # fmt: skip
def test_bits_are_understood_however_they_are_written(written: str, meant: str) -> None:
    assert resolve_recipe(None, bits=written) == resolve_recipe(meant)
    assert resolve_recipe(written) == resolve_recipe(meant)


@pytest.mark.parametrize(
    "written", ["fp8", "fp16", "bf16", "float32", "e4m3", "nf4", "half", "float"]
)
def test_float_formats_are_refused_with_what_there_is(written: str) -> None:
    with pytest.raises(RecipeError, match=r"float format.*w8a8"):
        resolve_recipe(None, bits=written)


@pytest.mark.parametrize("written", ["int16", "w4a16", "w0a8", "16"])
def test_bits_that_no_file_has_are_refused_by_their_number(written: str) -> None:
    with pytest.raises(RecipeError, match="1 to 8"):
        resolve_recipe(None, bits=written)


def test_without_options_a_run_is_the_goal_speed() -> None:
    default = resolve_recipe()
    assert default == resolve_recipe("speed")
    assert (default.weight_bits, default.activation_bits, default.steps) == (8, 8, 64)
    assert default.name == "w8a8"


def test_goals_differ_in_bits_profile_and_tolerance() -> None:
    small, near = resolve_recipe("size"), resolve_recipe("accuracy")
    assert (small.weight_bits, small.profile) == (4, "packed")
    assert (near.weight_bits, near.steps, near.tolerance) == (8, None, 0.02)


def test_epochs_that_are_asked_for_stand_in_place_of_the_steps_of_a_goal() -> None:
    assert resolve_recipe("speed", epochs=3).steps is None
    assert resolve_recipe("speed", settings=["epochs=3"]).steps is None
    assert resolve_recipe("speed", epochs=3, steps=5).steps == 5
