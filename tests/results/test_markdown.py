"""report.md fits one screen and shows names as they are: no table, link or HTML comes of them."""

from __future__ import annotations

from typing import Any

import pytest
from reports import LAYER, REPORT

from sqakd_fx.results.markdown import float_operations, markdown, plain

HOSTILE = (
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://a/b.png)", "a|b|c", "`` ` ``",
    "a\n\n# heading", "\x1b[31m", "&lt;b&gt;", "a\\|b",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_in_every_place(name: str) -> None:
    data = {"training": name, "batches": 1, "batch_size": 1, "evaluation": name}
    report = REPORT | {
        "name": name,
        "recipe": name,
        "source": name,
        "date": name,
        "processor": name,
        "data": data,
        "summary": [(name, name, name)],
        "validation_lines": [name],
        "training_notes": [name],
        "slower_than_float": name,
        "stays_in_float": [{"node": name, "reason": name}],
    }
    text = markdown(report)
    assert "<" not in text
    assert "\x1b" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(unescaped_bars(line)) in (3, 4)


def long_report() -> dict[str, Any]:
    notes = [
        {"node": f"softmax_{index}", "reason": f"reason {index % 30} " + "that is long " * 20}
        for index in range(200)
    ]
    return REPORT | {
        "layers": [LAYER | {"name": f"layers.{index}"} for index in range(300)],
        "stays_in_float": notes,
        "summary": [(f"output {index}", "", "cosine 0.99") for index in range(40)],
        "validation": {"samples": 500, "failures": ["one tensor is off " * 20] * 9},
        "validation_lines": ["a sentence about a check " * 12] * 20,
        "training_notes": ["a note on the training " * 12] * 20,
    }


def test_it_fits_one_screen_however_large_the_network_is() -> None:
    lines = markdown(long_report()).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines[3:])) <= 105
    assert "- weights: 8 bits in 300 layers" in lines


def test_the_verdict_comes_first_and_checks_come_last() -> None:
    lines = markdown(REPORT).splitlines()
    assert lines[2] == "**The file computes what was trained, and keeps to the float model.**"
    titles = [line for line in lines if line.startswith("## ")]
    assert titles == ["## Bits, and what stays in float", "## Checks"]
    assert "| date | 2026-01-02 03:04 UTC |" in lines
    assert "| data | Images of 8000 samples; checked on 500 samples |" in lines


def test_a_failure_is_the_verdict_and_the_first_check() -> None:
    failed = {"samples": 500, "failures": ["relu is off by 3 steps"]}
    lines = markdown(REPORT | {"validation": failed}).splitlines()
    assert "does not compute what was trained: relu is off by 3 steps" in lines[2]
    assert lines[lines.index("## Checks") + 2] == "- FAILED: relu is off by 3 steps"


def test_what_a_session_has_to_ask_for_is_said_in_full() -> None:
    line = 'weight_range = "full": ' + "sums overflow unless the session asks for more " * 4 + "end"
    lines = markdown(REPORT | {"validation_lines": ["a check", line]}).splitlines()
    assert max(map(len, lines)) <= 100
    assert plain(line) in " ".join(part.removeprefix("- ").strip() for part in lines)


def test_what_stays_in_float_is_told_by_reason() -> None:
    notes = [{"node": f"softmax_{index}", "reason": "is computed in float"} for index in range(3)]
    text = markdown(REPORT | {"stays_in_float": notes})
    assert "- is computed in float (3: softmax_0, softmax_1, softmax_2)" in text


def unescaped_bars(line: str) -> list[int]:
    found, escaped = [], False
    for index, character in enumerate(line):
        if character == "|" and not escaped:
            found.append(index)
        escaped = character == "\\" and not escaped
    return found


def test_links_images_and_code_do_not_open() -> None:
    assert plain("![a](b) `c`") == "!\\[a\\](b) \\`c\\`"
    assert plain("conv_1.weight (4 bits)") == "conv_1.weight (4 bits)"


def test_few_operations_in_float_are_told_with_reasons_and_many_are_counted() -> None:
    one = {"conv/Conv (Conv)": "its weight is float"}
    assert float_operations(one) == "conv/Conv (Conv): its weight is float"
    assert float_operations({}) == "none"
    many = {f"layer.{i} ({kind})": "why" for i, kind in enumerate(["Add"] * 9 + ["MatMul"] * 4)}
    told = float_operations(many)
    assert told.startswith("13 (9 Add, 4 MatMul), all of them in report.json")
    assert told.count("why") == 3
