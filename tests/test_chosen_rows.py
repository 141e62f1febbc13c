"""Benches take globs of rows, and refuse one that names none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from chosen import chosen

ROWS = ("float eager", "ours w4a4", "ours w8a8")


def test_rows_keep_their_order() -> None:
    assert chosen(ROWS, ["ours*", "float*"]) == list(ROWS)


def test_a_glob_that_names_no_row_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"'ours w3a3' matches nothing; there are float eager"):
        chosen(ROWS, ["float*", "ours w3a3"])
