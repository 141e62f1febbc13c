"""Names of models, layers and files are shown as they are: they neither raise in rich nor give the terminal orders."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from reports import REPORT
from torch import nn

from sqakd_fx.cli.closing import print_closing
from sqakd_fx.cli.graphs import SourceGraphs
from sqakd_fx.cli.inspect import show_onnx, show_stage
from sqakd_fx.diagnostics.terminal import say
from sqakd_fx.diagnostics.wording import printable
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.source import Source
from sqakd_fx.training.live import Live

HOSTILE = (
    "a[/]b",
    "[red]x",
    "[link=file:///etc/passwd]y[/link]",
    ":bomb:",
    "\x1b]0;title\x07z",
    "\x9b2J",
    "\u202eevil",
)
ORDERS = ("\x1b", "\x07", "\x9b", "\u202e", "\r")


def require_harmless(text: str) -> None:
    assert not any(order in text for order in ORDERS)


def test_what_moves_a_cursor_is_spelt_out() -> None:
    assert printable("a\x1b[31mb\n\u202e") == "a\\x1b[31mb\\n\\u202e"
    assert printable("Größe 3×4 → “ok”") == "Größe 3×4 → “ok”"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_shows_any_name(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with Live() as live:
        live.stage("load", name)
        live.note(name)
        live.stage("trace", name)
    print_closing(REPORT | {"validation_lines": [name], "metric": name}, Path(name), [name])
    say(name)
    told = capsys.readouterr()
    require_harmless(told.out + told.err)
    assert told.err.count(printable(name)) == 3
    assert told.out.count(printable(name)) >= 4  # a path has lost its doubled slashes


@pytest.mark.parametrize("form", ["table", "tree", "code", "dot", "json"])
def test_a_model_with_any_names_is_inspected(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential()
    for name in HOSTILE:
        net.add_module(name.replace(".", "_"), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    source = Source(HOSTILE[0], HOSTILE[0], net.eval(), (x,), {}, None, None, None)
    show_stage(SourceGraphs(source, resolve_recipe("w4a4")), "quantized", form)
    require_harmless(capsys.readouterr().out)


def test_an_onnx_file_with_any_names_is_inspected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nodes = [
        onnx.helper.make_node("Neg", [f"x{i}"], [f"x{i + 1}"], name=n)
        for i, n in enumerate(HOSTILE)
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    onnx.helper.set_model_props(model, {name: name for name in HOSTILE})
    onnx.save(model, tmp_path / "m.onnx")
    show_onnx(tmp_path / "m.onnx", "table")
    require_harmless(capsys.readouterr().out)
