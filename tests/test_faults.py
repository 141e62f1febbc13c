"""A small sample of benchmarks/faults.py: what is not success is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bad_data
import faults
import hostile_files

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


OPTIONS = [option for option in faults.all_options() if option.command != "example"]
"""Of all commands but the one that writes a folder wherever it is told to."""
ABSENT = dict.fromkeys(("source", "target", "result"), "absent")
"""Whatever an option holds, the model is not there: a case costs milliseconds."""


@settings(
    max_examples=2,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.lists(
        st.sampled_from(faults.TEXTS) | st.text(max_size=20),
        min_size=len(OPTIONS),
        max_size=len(OPTIONS),
    )
)
def test_any_text_of_each_option_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for option, text in zip(OPTIONS, texts, strict=True):
        names = faults.USUAL.get(option.command, {})
        usual = {name: value for name, value in ABSENT.items() if name in names}
        told = faults.answer_of(option.arguments(text, usual))
        assert told in faults.GOOD, (option, text)
    assert not list(tmp_path.iterdir())


def test_every_option_of_every_command_is_tried() -> None:
    tried = {(option.command, option.name) for option in OPTIONS}
    assert {command for command, _ in tried} > {"quantize", "sensitivity", "inspect", "export"}
    assert {("quantize", "--dump"), ("inspect", "--diff"), ("validate", "target")} < tried


def test_a_sample_of_hostile_options_ends_in_sentences() -> None:
    found = dict(faults.options_campaign(12))
    assert len(found) == 12
    assert set(found.values()) <= faults.GOOD, found


def test_data_of_many_kinds_has_a_case_in_every_place() -> None:
    names = [case.what for case in bad_data.cases()]
    assert len(names) == len(set(names)) > 300


def test_a_sample_of_bad_data_ends_in_sentences() -> None:
    found = dict(faults.data_campaign(8))
    assert set(found.values()) <= faults.GOOD, found


def test_a_sample_of_files_that_were_made_to_do_harm_does_none() -> None:
    assert len(hostile_files.cases()) > 100
    found = dict(faults.files_campaign(12))
    assert set(found.values()) <= faults.GOOD, found


def test_the_campaign_sees_code_that_runs_and_what_is_changed_outside(tmp_path: Path) -> None:
    def runs(place: hostile_files.Place) -> list[str]:
        return ["inspect", "evil.py"]

    def changes(place: hostile_files.Place) -> list[str]:
        place.write("model.py", "open('../outside/secret', 'w').close()\n")
        return ["inspect", "model.py"]

    (tmp_path / "net").mkdir()
    for name, make, told in (("a", runs, "code was run"), ("b", changes, "something outside")):
        (tmp_path / name).mkdir()
        assert faults._harm_of(make, tmp_path / name, tmp_path / "net").startswith(told)


def test_the_campaign_calls_a_traceback_a_fault() -> None:
    assert faults.outcome_of(lambda: 1 / 0).startswith("ZeroDivisionError")
    assert faults.outcome_of(lambda: None) == "success"
