"""The table of `sensitivity`."""

from __future__ import annotations

import pytest

from sqakd_fx.cli.sensitivity import show
from sqakd_fx.mixed_precision.sensitivity import LayerSensitivity


def test_the_ranking_has_a_line_a_layer_in_eighty_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal's
    monkeypatch.setenv("TERM", "dumb")
    costs = {bits: 1.234567e-3 / bits for bits in (2, 3, 4, 6, 8)}
    names = ["layer1.0.conv1", "encoder.layers.11.dense", "head"]
    layers = [LayerSensitivity(name, 2_359_296, 115_605_504, 4, "recipe", costs) for name in names]
    show(layers, dict.fromkeys(names, 4), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    for name in names:
        (line,) = (text for text in lines if text.startswith(name[:14]))
        assert "2.36M" in line
        assert "6.2e-4" in line
