"""A small sample of benchmarks/faults.py: what is not success is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import faults

from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe


def key_and_value() -> st.SearchStrategy[str]:
    key = st.sampled_from([*Recipe.model_fields, "no such key", "override.0.match"])
    number = st.integers() | st.floats()
    text = st.text(max_size=20).map(repr)
    value = st.sampled_from(faults.HOSTILE) | number.map(str) | text
    return st.builds("{}={}".format, key, value)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(key_and_value())
def test_any_value_of_any_key_is_taken_or_refused_in_a_sentence(text: str) -> None:
    assert faults.outcome_of(lambda: resolve_recipe("w4a4", settings=[text])) in faults.GOOD


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=key_and_value().filter(lambda text: faults.is_taken(text)))
def test_what_a_recipe_takes_trains_or_ends_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("run")
    assert faults.outcome_of(lambda: faults.small_run([text], folder)) in faults.GOOD


def test_a_sample_of_hostile_options_ends_in_sentences() -> None:
    found = dict(faults.options_campaign(12))
    assert len(found) == 12
    assert set(found.values()) <= faults.GOOD, found


def test_the_campaign_calls_a_traceback_a_fault() -> None:
    assert faults.outcome_of(lambda: 1 / 0).startswith("ZeroDivisionError")
    assert faults.outcome_of(lambda: None) == "success"
