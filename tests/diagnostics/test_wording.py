"""Parts of messages about names."""

from __future__ import annotations

from sqakd_fx.diagnostics.wording import first_of


def test_names_up_to_the_most_are_all_told() -> None:
    assert first_of(["a", "b"], 2) == "a, b"


def test_names_beyond_the_most_are_counted() -> None:
    assert first_of(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_no_names_are_no_text() -> None:
    assert first_of([], 2) == ""
