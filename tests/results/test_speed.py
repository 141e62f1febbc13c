"""A file that is slower than the float model says so first, and where its time goes."""

from __future__ import annotations

import pytest
from reports import REPORT

from sqakd_fx.results.collect import slower_sentence
from sqakd_fx.results.markdown import markdown
from sqakd_fx.results.measure import Measured
from sqakd_fx.runtime.node_times import NodeTime


def measured(float_ms: float | None, integer_ms: float) -> Measured:
    longest = (NodeTime("wide/Conv", "QLinearConv", 0.71), NodeTime("gelu/Erf", "Erf", 0.1))
    return Measured(None, None, (), 1000, float_ms, 300, integer_ms, longest)


def test_the_first_line_names_what_takes_longest() -> None:
    said = slower_sentence(measured(1.0, 2.5))
    assert said == (
        "The file is slower than the float model: 2.500 ms a call, 2.50 times as long. "
        "It spends most time in wide/Conv (QLinearConv) 71%, gelu/Erf (Erf) 10%."
    )
    lines = markdown(REPORT | {"slower_than_float": said}).splitlines()
    assert lines[2] == f"**{said}**"


@pytest.mark.parametrize(("float_ms", "integer_ms"), [(1.0, 0.5), (1.0, 1.04), (None, 9.0)])
def test_a_file_that_is_as_fast_says_nothing(float_ms: float | None, integer_ms: float) -> None:
    assert slower_sentence(measured(float_ms, integer_ms)) is None
