"""The last lines of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from reports import REPORT

from sqakd_fx.cli.closing import closing, print_closing

FILE = Path("out/model.onnx")


def test_the_last_lines_are_file_size_accuracy_speed_and_what_to_do_next() -> None:
    lines = closing(REPORT, FILE, ["model.py", "--data", "my photos"])
    labels = [label for label, _ in lines]
    assert labels == [
        "file",
        "size",
        "accuracy",
        "accuracy",
        "speed",
        "smaller",
        "run it",
        "report",
        "charts",
    ]
    told = dict(lines)
    again = "sqakd-fx quantize model.py --data 'my photos' --for size"
    assert told["smaller"] == f"about 73 KiB: {again}"
    assert told["file"] == "out/model.onnx"
    assert told["run it"] == "python out/deploy.py"
    assert told["charts"] == "sqakd-fx report out --open"


def test_a_loss_is_followed_by_the_command_against_it() -> None:
    lost = REPORT | {"accuracy": {"float": 93.2, "student": 90.0, "onnx": 90.0}}
    told = dict(closing(lost, FILE, ["model.py"]))
    assert "sqakd-fx quantize model.py --for accuracy" in told["nearer"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_lines_break_between_words_at_every_width(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    checked = REPORT | {"validation_lines": ["all quantized tensors are equal " * 9]}
    print_closing(checked, FILE, ["model.py"])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= columns for line in lines)
    words = {word for line in lines for word in line.split()}
    assert {"tensors", "prediction", "samples", "processor,"} <= words
    assert not words & {"quant", "unlab", "tens"}
