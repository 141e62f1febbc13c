"""A target is a row of one table, and a recipe's target decides what is trained and written."""

from __future__ import annotations

from typing import get_args

import pytest

from sqakd_fx.errors import RecipeError
from sqakd_fx.exporters.profiles import PROFILES
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.targets import TARGETS, TargetName


def test_a_recipe_knows_the_targets_whose_files_are_validated() -> None:
    validated = [name for name, row in TARGETS.items() if row.profile in (None, "tensorrt")]
    assert list(get_args(TargetName)) == validated
    assert {row.profile for row in TARGETS.values()} - {None} <= set(PROFILES)


def test_a_target_with_a_form_of_its_own_refuses_another_profile() -> None:
    with pytest.raises(RecipeError, match="leave out profile = 'packed'"):
        resolve_recipe("w4a4", target="tensorrt", profile="packed")
    assert resolve_recipe("w4a4", target="openvino", profile="packed").profile == "packed"


def test_an_unknown_target_is_told_with_those_that_exist() -> None:
    with pytest.raises(RecipeError, match="'onnxruntime', 'tensorrt' or 'openvino'"):
        resolve_recipe("w4a4", target="tpu")
