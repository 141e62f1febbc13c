"""report.md shows names as they are: no table, link or HTML comes of them."""

from __future__ import annotations

import pytest

from sqakd_fx.ir.pass_manager import Note
from sqakd_fx.program import LayerFacts
from sqakd_fx.results.markdown import markdown, plain

HOSTILE = (
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://a/b.png)", "a|b|c", "`` ` ``",
    "a\n\n# heading", "\x1b[31m", "&lt;b&gt;", "a\\|b",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_in_every_place(name: str) -> None:
    report = {
        "name": name,
        "recipe": name,
        "summary": [(name, name, name)],
        "validation_lines": [name],
        "training_notes": [name],
        "slower_than_float": name,
    }
    layer = LayerFacts(name, name, 4, 4, name, "channel", 10, name)
    text = markdown(report, [layer], [Note(name, name)])
    assert "<" not in text
    assert "\x1b" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(unescaped_bars(line)) in (4, 8)


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
