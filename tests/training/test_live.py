"""What a run shows while it goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sqakd_fx.training import live as live_module
from sqakd_fx.training.live import Live, curve
from sqakd_fx.training.progress import StepReport

REPORT = StepReport(
    step=12_000,
    steps=240_000,
    loss=0.0478,
    learning_rate=1e-3,
    steps_per_second=2.7,
    seconds_left=84_000.0,
    agreement=0.977,
    peak_bytes=2**30,
    compile_seconds=0.0,
)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_live_view_fits_the_terminal_and_says_step_and_time_left(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Live() as live:
        live.stage("distil", "240000 steps on cpu, no labels, and more that may be said of it")
        assert live.progress_bar is not None
        for step in (10, 11_000):
            live.progress(step, 240_000)
        live.training(replace(REPORT, step=6_000, loss=0.9, agreement=0.5))
        live.training(REPORT)
        lines = live.console.render_lines(live.progress_bar.get_renderable())
    (line,) = ("".join(part.text for part in one).rstrip() for one in lines)
    assert len(line) <= columns
    assert "12000 of 240000" in line
    wide = "loss 0.0478 █▁  agreement 97.7% ▁█  2.7 steps/s"
    assert (wide if columns == 120 else "loss 0.0478  agreement 97.7%") in line
    assert line.endswith("left")
    assert ("2.7 steps/s" in line) == (columns == 120)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([1.0], ""), ([1.0, 1.0], "▁▁"), ([8.0, 1.0], "█▁"), (range(800), "▁▂▃▄▅▆▇█")],
)
def test_a_curve_has_as_many_blocks_as_there_is_room_for(values: list[float], drawn: str) -> None:
    assert curve(values) == drawn


def test_a_terminal_breaks_notes_between_words_and_a_file_has_them_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "sentences that say something of the data " * 4
    monkeypatch.setenv("COLUMNS", "80")
    Live().note(words)
    monkeypatch.setenv("FORCE_COLOR", "1")
    Live().note(words)
    whole, *broken = (line.strip() for line in capsys.readouterr().err.splitlines())
    assert whole == f"note: {words.strip()}"
    assert len(broken) > 1
    assert " ".join(broken) == whole


def test_a_slow_stage_says_how_far_it_is_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(live_module.time, "monotonic", lambda: float(next(clock)))
    with Live() as live:
        live.stage("distil", "6 steps")
        for step in range(1, 7):
            live.progress(step, 6)
    told = [line for line in capsys.readouterr().err.splitlines() if " of 6, about" in line]
    assert 1 <= len(told) < 6
