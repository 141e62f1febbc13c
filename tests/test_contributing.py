"""The examples of CONTRIBUTING.md do what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from sqakd_fx.exporters.container import TRANSLATIONS
from sqakd_fx.exporters.profiles import PROFILES
from sqakd_fx.ir.op_table import TABLE

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(autouse=True)
def restored_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an example adds is gone behind its test."""
    monkeypatch.chdir(tmp_path)
    kept = [(table, dict(table)) for table in (TABLE, TRANSLATIONS, PROFILES)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def run_example(heading: str) -> dict[str, Any]:
    """The names that the example under a heading leaves."""
    section = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.M)
    text = next(part for part in section if part.startswith(f"{heading}\n"))
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    names: dict[str, Any] = {"__name__": "example"}
    torch.manual_seed(0)
    exec(compile(example, str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_the_pass_leaves_out_a_relu_and_changes_no_output() -> None:
    (entry,) = run_example("A pass")["compiled"].log
    assert (entry.name, entry.removed, entry.changed) == ("drop_repeated_relu", 1, True)
    assert entry.difference == 0


def test_the_operation_is_computed_on_integers_and_is_exact_in_the_file() -> None:
    names = run_example("An operation")
    assert torch.ops.sqakd_fx.rsub.default in {node.target for node in names["lowered"].graph.nodes}
    assert not names["checked"].failures
    operators = [node.op_type for node in onnx.load(names["exported"].path).graph.node]
    assert operators.count("Sub") == 1


def test_the_exporter_writes_a_line_for_each_operation() -> None:
    names = run_example("An exporter")
    listing = names["written"].path.read_text()
    assert "sqakd_fx.conv" in listing
    assert "sqakd_fx.linear" in listing
    assert names["written"].notes == (f"{len(listing.splitlines())} operations",)


def test_the_commands_of_the_page_exist() -> None:
    root = PAGE.parent
    for script in re.findall(r"bash (\S+)", PAGE.read_text("utf-8")):
        assert (root / script).exists(), script
    for path in re.findall(
        r"`((?:sqakd_fx|passes|exporters|tests)/[\w./]+)`", PAGE.read_text("utf-8")
    ):
        assert (root / path).exists(), path
